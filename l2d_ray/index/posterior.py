"""The files behind the aggregation `posterior`, and the scorer of a shard that is made from them."""

from typing import Any

import numpy as np

from l2d_ray.core.arrays import Float64, IntArray
from l2d_ray.core.posterior import FLOOR, ItemScorer
from l2d_ray.core.samples import item_shards
from l2d_ray.core.transition_counts import TransitionCounts
from l2d_ray.index.files import read_array, read_arrays, write_arrays
from l2d_ray.index.manifest import IndexFile, PosteriorRecord
from l2d_ray.workspace import Workspace


def shard_items(num_items: int, num_shards: int, shard: int) -> IntArray:
    """Return the items of the catalogue that belong to a shard, with rows or without, ascending."""
    return np.flatnonzero(item_shards(np.arange(num_items, dtype=np.int32), num_shards) == shard)


def write_counts(workspace: Workspace, path: str, counts: TransitionCounts) -> IndexFile:
    """Write counts as one .npz."""
    return write_arrays(workspace, path, vars(counts))


def read_counts(workspace: Workspace, file: IndexFile) -> TransitionCounts:
    """Return the counts that `write_counts` wrote. Raises InputError if the file differs from its record."""
    values: dict[str, Any] = read_arrays(workspace, file)
    values |= {name: array.item() for name, array in values.items() if array.ndim == 0}
    return TransitionCounts(**values)


def open_scorer(
    workspace: Workspace, posterior: PosteriorRecord, shard: int, offset_D: Float64, verify: bool = False
) -> ItemScorer:
    """Return the scorer of a shard. Raises InputError as `read_counts` does; `verify` is that of `read_array`."""
    counts = read_counts(workspace, posterior.transitions[shard].file)
    shape = counts.targets_V.size, offset_D.size
    return ItemScorer(
        items_V=counts.targets_V,
        means_VD=np.asarray(read_array(workspace, posterior.means[shard], shape, verify)),
        offset_D=offset_D,
        unseen_V=counts.samples_V == 0,
        transitions=counts.weigh(posterior.parameters.lag_decay, FLOOR),
        parameters=posterior.parameters,
    )

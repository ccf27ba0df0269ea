"""The files behind the aggregation `posterior`, and the scorer of a shard that is made from them."""

import io

import numpy as np

from l2d_ray.core.arrays import Float64, FloatArray, IntArray, Integers
from l2d_ray.core.posterior import FLOOR, ItemScorer
from l2d_ray.core.samples import item_shards
from l2d_ray.core.transitions import TransitionCounts
from l2d_ray.index.files import read_bytes, write_arrays
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
    arrays = dict(np.load(io.BytesIO(read_bytes(workspace, file))))
    return TransitionCounts(samples=int(arrays.pop("samples")), **arrays)


def centred(centroids_ID: FloatArray, offset_D: Float64) -> FloatArray:
    """Return item means less the offset, float32; the same array where the offset is zero."""
    return (centroids_ID - offset_D).astype(np.float32) if offset_D.any() else np.asarray(centroids_ID)


def open_scorer(
    workspace: Workspace,
    posterior: PosteriorRecord,
    shard: int,
    items_I: Integers,
    centroids_ID: FloatArray,
    offset_D: Float64,
) -> ItemScorer:
    """Return the scorer of a shard, given its items with rows and their means. Raises InputError as `read_counts`."""
    counts = read_counts(workspace, posterior.transitions[shard].file)
    return ItemScorer(
        items_V=counts.targets_V,
        with_rows_I=np.searchsorted(counts.targets_V, items_I),
        means_ID=centred(centroids_ID, offset_D),
        offset_D=offset_D,
        transitions=counts.weigh(posterior.parameters.lag_decay, FLOOR),
        parameters=posterior.parameters,
    )

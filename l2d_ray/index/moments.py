"""Sums over rows on disk, from which item means and the space of the index are computed."""

import io
from dataclasses import dataclass
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.arrays import Float64
from l2d_ray.core.moments import Moments
from l2d_ray.errors import InputError
from l2d_ray.index.files import read_arrays, write_arrays
from l2d_ray.index.manifest import IndexFile
from l2d_ray.workspace import Workspace


@dataclass(frozen=True)
class ShardMoments:
    """Item sums and second moments of a shard's rows."""

    items_I: NDArray[np.int32]
    """Items that have rows in the shard, ascending."""
    counts_I: NDArray[np.int64]
    sums_ID: Float64
    moments: Moments

    @classmethod
    def zero(cls, dimension: int) -> "ShardMoments":
        """Return the sums of no rows."""
        none = np.empty(0, np.int64)
        return cls(none.astype(np.int32), none, np.empty((0, dimension)), Moments.zero(dimension))

    def plus(self, other: "ShardMoments", sign: int = 1) -> "ShardMoments":
        """Return the sums over the rows of both. With `sign` -1, `other` are rows to take out, all of which are here.

        `other` may be without the moments of its items (`Moments.of_items`). Only those of items that it has change.
        """
        items_I = np.union1d(self.items_I, other.items_I)
        counts_I, sums_ID = np.zeros(items_I.size, np.int64), np.zeros((items_I.size, self.sums_ID.shape[1]))
        places, changed = np.searchsorted(items_I, self.items_I), np.searchsorted(items_I, other.items_I)
        counts_I[places], sums_ID[places] = self.counts_I, self.sums_ID
        moments = self.moments.with_rows(other.moments, sign)
        moments = moments.with_items(Moments.of_items(sums_ID[changed], counts_I[changed]), -1)
        counts_I[changed] += sign * other.counts_I
        sums_ID[changed] += sign * other.sums_ID
        moments = moments.with_items(Moments.of_items(sums_ID[changed], counts_I[changed]))
        left_I = counts_I > 0
        return ShardMoments(items_I[left_I], counts_I[left_I], sums_ID[left_I], moments)

    def write(self, workspace: Workspace, path: str) -> None:
        """Write the sums as one .npz."""
        item_arrays = {"items_I": self.items_I, "counts_I": self.counts_I, "sums_ID": self.sums_ID}
        write_arrays(workspace, path, item_arrays | vars(self.moments))

    @classmethod
    def read(cls, workspace: Workspace, path: str) -> "ShardMoments":
        """Read the sums that `write` wrote. Raises InputError if the file is damaged."""
        with workspace.filesystem.open_input_stream(workspace.path(path)) as stream:
            content = io.BytesIO(stream.read())
        try:
            arrays = dict(np.load(content))
            item_arrays = {name: arrays.pop(name) for name in ("items_I", "counts_I", "sums_ID")}
            rows, items = int(arrays.pop("rows")), int(arrays.pop("items"))
        except (ValueError, BadZipFile, EOFError, KeyError) as error:
            raise InputError(
                f"{workspace.path(path)}: damaged ({error}); delete it and run jobs/build_index.py again"
            ) from None
        return cls(**item_arrays, moments=Moments(rows=rows, items=items, **arrays))


def write_moments(workspace: Workspace, path: str, moments: Moments) -> IndexFile:
    """Write moments as one .npz."""
    return write_arrays(workspace, path, vars(moments))


def read_moments(workspace: Workspace, file: IndexFile) -> Moments:
    """Return the moments that `write_moments` wrote. Raises InputError if the file differs from its record."""
    arrays = read_arrays(workspace, file)
    return Moments(rows=int(arrays.pop("rows")), items=int(arrays.pop("items")), **arrays)

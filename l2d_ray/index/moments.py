"""Sums over rows on disk, from which item means and the space of the index are computed."""

import io
from dataclasses import dataclass, fields
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.arrays import Float64
from l2d_ray.core.decay import NO_DAY, weights
from l2d_ray.core.moments import ItemSums, Moments
from l2d_ray.errors import InputError
from l2d_ray.index.files import read_arrays, write_arrays
from l2d_ray.index.manifest import IndexFile
from l2d_ray.workspace import Workspace


@dataclass(frozen=True)
class WeightedSums:
    """Item sums of rows that weigh less the older they are (`core.decay`), of the items of a `ShardMoments`."""

    half_life_days: float
    newest_day: int
    """Day of the newest row, which weighs 1."""
    weights_I: Float64
    sums_ID: Float64

    @classmethod
    def zero(cls, half_life_days: float | None, dimension: int) -> "WeightedSums | None":
        """Return the sums of no rows; None without a half-life."""
        return cls(half_life_days, NO_DAY, np.empty(0), np.empty((0, dimension))) if half_life_days else None


WEIGHTED = tuple(field.name for field in fields(WeightedSums))


@dataclass(frozen=True)
class ShardMoments:
    """Item sums and second moments of a shard's rows."""

    items_I: NDArray[np.int32]
    """Items that have rows in the shard, ascending."""
    counts_I: NDArray[np.int64]
    sums_ID: Float64
    moments: Moments
    weighted: WeightedSums | None = None
    """None without `index.half_life_days`."""

    @classmethod
    def zero(cls, dimension: int, half_life_days: float | None = None) -> "ShardMoments":
        """Return the sums of no rows."""
        none, weighted = np.empty(0, np.int64), WeightedSums.zero(half_life_days, dimension)
        return cls(none.astype(np.int32), none, np.empty((0, dimension)), Moments.zero(dimension), weighted)

    def plus(self, other: "ShardMoments", sign: int = 1) -> "ShardMoments":
        """Return the sums over the rows of both. With `sign` -1, `other` are rows to take out, all of which are here.

        `other` may be without the moments of its items (`Moments.of_items`). Only those of items that it has change.
        Weighted rows cannot be taken out.
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
        weighted = self._weighted_plus(other, items_I)
        return ShardMoments(items_I[left_I], counts_I[left_I], sums_ID[left_I], moments, weighted)

    def _weighted_plus(self, other: "ShardMoments", items_I: NDArray[np.int32]) -> WeightedSums | None:
        if not self.weighted or not other.weighted:
            return None
        half_life_days = self.weighted.half_life_days
        newest_day = max(self.weighted.newest_day, other.weighted.newest_day)
        weights_I, sums_ID = np.zeros(items_I.size), np.zeros((items_I.size, self.sums_ID.shape[1]))
        for items, part in ((self.items_I, self.weighted), (other.items_I, other.weighted)):
            places, factor = np.searchsorted(items_I, items), weights(part.newest_day, newest_day, half_life_days)
            weights_I[places] += factor * part.weights_I
            sums_ID[places] += factor * part.sums_ID
        return WeightedSums(half_life_days, newest_day, weights_I, sums_ID)

    def item_sums(self, newest_day: int) -> ItemSums:
        """Return the sums that item means are estimated from: the weighted ones, on this day, if there are any."""
        if self.weighted is None:
            return ItemSums(self.items_I, self.counts_I, self.sums_ID)
        factor = weights(self.weighted.newest_day, newest_day, self.weighted.half_life_days)
        weights_I = factor * self.weighted.weights_I
        left_I = weights_I > 0
        return ItemSums(self.items_I[left_I], weights_I[left_I], factor * self.weighted.sums_ID[left_I])

    def write(self, workspace: Workspace, path: str) -> None:
        """Write the sums as one .npz."""
        item_arrays = {"items_I": self.items_I, "counts_I": self.counts_I, "sums_ID": self.sums_ID}
        weighted = {f"weighted_{name}": value for name, value in vars(self.weighted).items()} if self.weighted else {}
        write_arrays(workspace, path, item_arrays | vars(self.moments) | weighted)

    @classmethod
    def read(cls, workspace: Workspace, path: str) -> "ShardMoments":
        """Read the sums that `write` wrote. Raises InputError if the file is damaged."""
        with workspace.filesystem.open_input_stream(workspace.path(path)) as stream:
            content = io.BytesIO(stream.read())
        try:
            arrays = dict(np.load(content))
            item_arrays = {name: arrays.pop(name) for name in ("items_I", "counts_I", "sums_ID")}
            rows, items = int(arrays.pop("rows")), int(arrays.pop("items"))
            weighted = {name: arrays.pop(f"weighted_{name}") for name in WEIGHTED if f"weighted_{name}" in arrays}
        except (ValueError, BadZipFile, EOFError, KeyError) as error:
            raise InputError(
                f"{workspace.path(path)}: damaged ({error}); delete it and run jobs/build_index.py again"
            ) from None
        weighted |= {name: weighted[name].item() for name in WEIGHTED[:2] if weighted}
        return cls(
            **item_arrays,
            moments=Moments(rows=rows, items=items, **arrays),
            weighted=WeightedSums(**weighted) if weighted else None,
        )


def read_newest_day(workspace: Workspace, path: str) -> int:
    """Return the day of the newest row of weighted sums that `ShardMoments.write` wrote, and read nothing else."""
    with workspace.filesystem.open_input_file(workspace.path(path)) as file, np.load(file) as arrays:
        return int(arrays["weighted_newest_day"])


def write_moments(workspace: Workspace, path: str, moments: Moments) -> IndexFile:
    """Write moments as one .npz."""
    return write_arrays(workspace, path, vars(moments))


def read_moments(workspace: Workspace, file: IndexFile) -> Moments:
    """Return the moments that `write_moments` wrote. Raises InputError if the file differs from its record."""
    arrays = read_arrays(workspace, file)
    return Moments(rows=int(arrays.pop("rows")), items=int(arrays.pop("items")), **arrays)

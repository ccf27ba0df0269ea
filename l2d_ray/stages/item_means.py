"""Item means of an index around what titles predict (`core.titles`), for the aggregation `posterior`.

Shapes: V items of a shard, U queries, D hidden size.
"""

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np

from l2d_ray.core.arrays import Amounts, Float64, FloatArray, IntArray
from l2d_ray.core.moments import ItemSums
from l2d_ray.core.space import ItemMeans, LinearMap
from l2d_ray.core.titles import Standardisation, TitleRegression, Titles
from l2d_ray.index.files import read_map, read_means, write_array
from l2d_ray.index.manifest import Fitted, IndexFile
from l2d_ray.index.posterior import shard_items
from l2d_ray.stages.index_plan import IndexPlan


def read_maps(plan: IndexPlan) -> tuple[LinearMap, Float64, ItemMeans]:
    """Return what was fitted for an index: its map, the offset of mapped vectors, and the estimate of item means."""
    fitted = Fitted.read(plan.workspace, f"{plan.folder}/fitted.json")
    return *read_map(plan.workspace, fitted.map), read_means(plan.workspace, fitted.means)


class ShardMeans(NamedTuple):
    """Estimates of the items of a shard, with rows or without. Their means are `of_rows` + TITLE * `of_titles`."""

    items_V: IntArray
    of_rows_VD: Float64
    """Means around the prior mean 0, which are 0 without rows."""
    of_titles_VD: Float64
    """Prediction of the title, as far as rows have not replaced it: all of it without rows."""

    def with_titles(self, title: float) -> Float64:
        """Return the means, given TITLE."""
        return self.of_rows_VD + title * self.of_titles_VD


@dataclass(frozen=True)
class IndexMeans:
    """The item means of an index, shard by shard, less the offset of its space."""

    num_shards: int
    item_sums: Callable[[int], ItemSums]
    """Returns the sums of the rows of a shard's items."""
    titles_ID: FloatArray
    """State of each title of the catalogue."""
    space: LinearMap
    offset_D: Float64
    estimate: ItemMeans

    @classmethod
    def open(cls, plan: IndexPlan, titles_ID: FloatArray) -> Self:
        """Read what was fitted for an index. Its sums must be there."""
        return cls(plan.num_shards, plan.item_sums, titles_ID, *read_maps(plan))

    def shard(self, shard: int) -> ShardMeans:
        """Return the estimates of a shard's items."""
        items_V, titles, counts_V = self._titles(shard)
        predicted_VD = self._regression.leave_own_out(titles)
        of_rows_VD = self.estimate(titles.means_ID, counts_V)
        return ShardMeans(items_V, of_rows_VD, predicted_VD - self.estimate(predicted_VD, counts_V))

    def write(self, plan: IndexPlan, title: float) -> list[IndexFile]:
        """Write the item means of each shard, given TITLE, and return their records."""
        attempt, files = uuid.uuid4().hex[:8], []
        for number in range(self.num_shards):
            means_VD = self.shard(number).with_titles(title)
            path = plan.item_means(number, attempt)
            files.append(write_array(plan.workspace, path, means_VD.shape, np.float32, [means_VD]))
        return files

    @cached_property
    def _features(self) -> Standardisation:
        return Standardisation.of(self.titles_ID)

    @cached_property
    def _regression(self) -> TitleRegression:
        def parts() -> Iterator[Titles]:
            return (self._titles(shard)[1] for shard in range(self.num_shards))

        return TitleRegression.fit(parts)

    def _titles(self, shard: int) -> tuple[IntArray, Titles, Amounts]:
        """Return the items of a shard, what predicts their means, and the numbers or weights of their rows."""
        sums = self.item_sums(shard)
        items_V = shard_items(len(self.titles_ID), self.num_shards, shard)
        counts_V, means_VD = np.zeros(items_V.size, sums.counts_I.dtype), np.zeros((items_V.size, self.offset_D.size))
        places = np.searchsorted(items_V, sums.items_I)
        counts_V[places] = sums.counts_I
        means_VD[places] = self.space(sums.sums_ID / sums.counts_I[:, None]) - self.offset_D
        weights_V = counts_V / (1 + self.estimate.ratio * counts_V)
        return items_V, Titles(self._features(self.titles_ID[items_V]), means_VD, weights_V), counts_V

"""The last items of every training sample, by sample id: what a memory row was made from, without its user.

A sample takes 28 bytes of memory.

Shapes: N samples, L last items.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.arrays import IntArray
from l2d_ray.data.dataset import Dataset
from l2d_ray.data.samples import iter_samples
from l2d_ray.schema import Split

LAST_ITEMS = 5
NO_ITEM = -1


@dataclass(frozen=True)
class TrainingSequences:
    """The last items before the target of each training sample."""

    sample_ids_N: IntArray
    """Ascending."""
    items_NL: NDArray[np.int32]
    """In time order; NO_ITEM before the first item of a history."""

    @classmethod
    def read(cls, dataset: Dataset) -> "TrainingSequences":
        """Read a dataset. Raises InputError if it is damaged."""
        ids, items = [np.empty(0, np.int64)], [np.empty((0, LAST_ITEMS), np.int32)]
        for samples in iter_samples(dataset, Split.TRAIN):
            places_NL = samples.stops[:, None] + np.arange(-LAST_ITEMS, 0)
            is_item_NL = places_NL >= samples.begins[:, None]
            ids.append(samples.sample_ids)
            items.append(np.where(is_item_NL, samples.items[np.maximum(places_NL, 0)], np.int32(NO_ITEM)))
        ids_N = np.concatenate(ids)
        order_N = np.argsort(ids_N)
        return cls(ids_N[order_N], np.concatenate(items)[order_N])

    def of(self, sample_id: int) -> list[int]:
        """Return the last items of a sample; none if there is no such sample."""
        place = int(np.searchsorted(self.sample_ids_N, sample_id))
        if place == self.sample_ids_N.size or self.sample_ids_N[place] != sample_id:
            return []
        items: list[int] = self.items_NL[place].tolist()
        return [item for item in items if item != NO_ITEM]

"""The rules by which interactions are erased from a dataset, with jobs/erase.py.

users
    The whole history of the user goes, and the id.
items
    Every interaction with the item goes, and every sample whose target it is. So the item is not recommended any more.
    It keeps its index and its title, because indices never change, and may be named by a later request.
before
    Every interaction before that day goes, and every sample whose target is one.

A user of whom nothing is left goes, too. Other users keep the places of their interactions, and so the ids of their
samples. An erased interaction between others leaves an empty place: the item is `schema.ERASED_ITEM`, the split NONE,
the time that of a neighbour. Readers of samples skip it. The first interaction that is left has no history any more, so
that it is no sample. Hidden states of later samples stay as they are: they were computed with the erased items in their
windows, of which they keep no text.

The k-core is not made again. An interaction that was erased enters again if it is given again, so it must leave the raw
files, too. Weights of models that were trained on it stay.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from l2d_ray.core.arrays import IntArray
from l2d_ray.core.samples import sample_ids
from l2d_ray.data.dataset import Dataset, write_part
from l2d_ray.data.generations import GROUP_USERS, Generation, Part
from l2d_ray.data.histories import Lists, as_lists
from l2d_ray.data.interactions import user_hashes
from l2d_ray.data.versions import GenerationRecord, Version
from l2d_ray.schema import ERASED_ITEM, HISTORIES, Split
from l2d_ray.workspace import Workspace


@dataclass(frozen=True)
class Erasure:
    """The interactions to erase from a dataset."""

    user_ids: pa.Array
    """Users to erase, each once."""
    items: NDArray[np.int32]
    """Indices of items."""
    before: int | None
    """Time, in the unit of the dataset."""

    @property
    def user_hashes(self) -> IntArray:
        """Hashes of the users, ascending."""
        return np.sort(user_hashes(self.user_ids))

    @property
    def of_users_alone(self) -> bool:
        """Whether no other history changes."""
        return self.items.size == 0 and self.before is None

    def with_users(self, user_ids: list[str]) -> "Erasure":
        """Return the erasure of these users, too."""
        every = pa.concat_arrays([self.user_ids, pa.array(user_ids, pa.string())])
        return replace(self, user_ids=pc.unique(every))

    def leaves(self, items: Lists, times: Lists) -> NDArray[np.bool_]:
        """Return [N] whether an interaction is left, judged by its item and its time."""
        is_left: NDArray[np.bool_] = (items.values != ERASED_ITEM) & ~np.isin(items.values, self.items)
        return is_left if self.before is None else is_left & np.asarray(times.values >= self.before)


@dataclass(frozen=True)
class ErasedPart:
    """A file of histories after an erasure."""

    part: Part | None
    """The old file if nothing was erased from it, else the new one; None if no user is left."""
    changed: bool = False
    removed: list[str] = field(default_factory=list)
    """Ids of the users who are gone."""
    without_history: IntArray = field(default_factory=lambda: np.empty(0, np.int64))
    """Ids of the samples that lost their whole history, in this erasure or in an earlier one."""


def find_emptied(dataset: Dataset, erasure: Erasure) -> list[str]:
    """Return the ids of the users of whom an erasure by items or time leaves nothing."""
    found: list[str] = []
    for users in dataset.iter_users():
        items, times = Lists.of(users["item_indices"]), Lists.of(users["timestamps"])
        left_before = np.append(0, np.cumsum(erasure.leaves(items, times)))
        nothing_left = np.diff(left_before[items.offsets]) == 0
        found += users["user_id"].filter(pa.array(nothing_left)).to_pylist()
    return found


def erase_part(uri: str, part: Part, erasure: Erasure, version: int, number: int) -> ErasedPart:
    """Write a file of histories again, without what is erased, as a part of a version; keep one that has nothing of it.

    `number` counts the parts of the version.
    """
    workspace = Workspace.open(uri)
    generation = Generation(workspace, "", 0, [part])
    if erasure.of_users_alone and not len(generation.find_users(erasure.user_ids, erasure.user_hashes)):
        return ErasedPart(part)
    users = pa.concat_tables(generation.iter_users(batch_users=GROUP_USERS))
    is_erased = pc.is_in(users["user_id"], value_set=erasure.user_ids)
    removed = users["user_id"].filter(is_erased).to_pylist()
    left, without_history, changed = _erase_interactions(users.filter(pc.invert(is_erased)), erasure)
    if not (removed or changed):
        return ErasedPart(part, without_history=without_history)
    new = write_part(workspace, number, left, version)[0] if len(left) else None
    return ErasedPart(new, True, removed, without_history)


def _erase_interactions(users: pa.Table, erasure: Erasure) -> tuple[pa.Table, IntArray, bool]:
    """Return histories without interactions, the ids of samples without a history, and whether anything changed."""
    items, times, splits = (Lists.of(users[name]) for name in ("item_indices", "timestamps", "splits"))
    is_left, places = erasure.leaves(items, times), np.arange(len(items.values))
    begins, ends = (np.repeat(bounds, items.lengths) for bounds in (items.offsets[:-1], items.offsets[1:]))
    last_left = np.maximum.accumulate(np.where(is_left, places, -1))  # at this place or before
    next_left = np.minimum.accumulate(np.where(is_left, places, len(places))[::-1])[::-1]
    neighbour = np.where(last_left >= begins, last_left, next_left)
    has_time = neighbour < ends
    new_times = np.zeros(len(places), np.int64)
    new_times[has_time] = times.values[neighbour[has_time]]
    is_first = is_left & (np.append(-1, last_left)[:-1] < begins)
    lost = np.flatnonzero(is_first & (places > begins))
    new_splits = np.where(is_left, splits.values, Split.NONE)
    new_splits[lost] = Split.NONE
    new_items = np.where(is_left, items.values, ERASED_ITEM)
    hashes = np.repeat(users["user_hash"].to_numpy(), items.lengths)
    columns = [
        users["user_id"],
        users["user_hash"],
        as_lists(items.offsets, new_items, pa.int32()),
        as_lists(items.offsets, new_times, pa.int64()),
        as_lists(items.offsets, new_splits, pa.int8()),
    ]
    changed = bool((new_items != items.values).any())
    return pa.table(columns, schema=HISTORIES), sample_ids(hashes[lost], lost - begins[lost]), changed


def next_version(dataset: Dataset, parts: Sequence[Sequence[ErasedPart]]) -> Version:
    """Return the version after an erasure, given the parts of each generation."""
    old = dataset.version
    paths = [part.part.path for of_generation in parts for part in of_generation if part.part]
    digest = hashlib.sha256(f"{dataset.digest} erased {paths}".encode()).hexdigest()
    return old.model_copy(
        update={
            "number": old.number + 1,
            "lineage": [*old.lineage, digest],
            "erasures": [*old.erasures, digest],
            "generations": list(_generations(old, parts, digest)),
            "refused": {},
            "changed_titles": 0,
        }
    )


def _generations(old: Version, parts: Sequence[Sequence[ErasedPart]], digest: str) -> Iterator[GenerationRecord]:
    removed: set[str] = set()
    for generation, erased in zip(old.generations, parts, strict=True):
        here = {user for part in erased for user in part.removed}
        files = [part.part for part in erased if part.part]
        if not any(part.changed for part in erased):
            yield generation
        elif files:
            yield GenerationRecord(
                version=hashlib.sha256(f"{digest} {generation.version}".encode()).hexdigest(),
                new_users=generation.new_users - len(here - removed),
                files=files,
            )
        removed |= here

"""Compaction of a dataset: the same histories and items in fewer files.

Generations are merged from the newest on, as long as the next older one is not much larger than all newer ones
together. So they are few, and an interaction is written again a few times at most: the rule of log-structured merge
trees (O'Neil et al., Acta Informatica 33, 1996). A generation of which the memory has no samples yet stays as it is.
"""

import hashlib
from collections.abc import Collection, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from l2d_ray.data.dataset import ITEMS_FOLDER, Dataset, write_part
from l2d_ray.data.generations import GROUP_USERS, Part, merge
from l2d_ray.data.histories import Lists
from l2d_ray.data.versions import GenerationRecord, Version

RATIO = 4
"""A generation is merged if it has fewer than this many times the interactions of all newer ones."""
ITEM_FILES = 8
"""Files of items, at most, before they become one."""
PART_INTERACTIONS = 5_000_000
"""Interactions of a part that a merge writes."""


def plan_merge(version: Version, pending: Collection[str]) -> range:
    """Return the places of the generations to merge, which may be none. `pending` are versions whose samples wait."""
    sizes = [
        sum(part.interactions for part in generation.files)
        for generation in version.generations
        if generation.version not in pending
    ]
    first = stop = len(sizes)
    while first and (first == stop or sizes[first - 1] < RATIO * sum(sizes[first:])):
        first -= 1
    return range(first, stop) if stop - first > 1 else range(0)


def merge_generations(dataset: Dataset, places: range, version: int) -> list[Part]:
    """Write some generations of a dataset as one, in parts of a version."""
    streams = [dataset.generations[place].iter_users(batch_users=GROUP_USERS) for place in places]
    parts: list[Part] = []
    tables: list[pa.Table] = []

    def write() -> None:
        if tables:
            parts.append(write_part(dataset.workspace, len(parts), pa.concat_tables(tables), version)[0])
            tables.clear()

    size = 0
    for users in merge(streams):
        tables.append(users)
        size += len(Lists.of(users["item_indices"]).values)
        if size >= PART_INTERACTIONS:
            write()
            size = 0
    write()
    return parts


def merged_version(dataset: Dataset, places: range, parts: Sequence[Part], needed: Collection[str]) -> Version:
    """Return the next version, with these parts in place of the generations that were merged.

    It has the digest of the version before. `needed` are the digests that its lineage must have.
    """
    old, number = dataset.version, dataset.version.number + 1
    generations = list(old.generations)
    if places:
        merged = generations[places.start : places.stop]
        labels = " ".join(generation.version for generation in merged)
        generations[places.start : places.stop] = [
            GenerationRecord(
                version=hashlib.sha256(f"merged {labels}".encode()).hexdigest(),
                new_users=sum(generation.new_users for generation in merged),
                files=list(parts),
            )
        ]
    oldest = min(
        (old.lineage.index(digest) for digest in needed if digest in old.lineage), default=len(old.lineage) - 1
    )
    lineage = [*old.lineage[: min(oldest, 1)], *old.lineage[oldest:]]
    return old.model_copy(
        update={
            "number": number,
            "lineage": lineage,
            "erasures": [digest for digest in old.erasures if digest in lineage],
            "generations": generations,
            "item_files": _merge_items(dataset, number),
        }
    )


def _merge_items(dataset: Dataset, number: int) -> list[str]:
    """Return the files of the items, written as one if they are many."""
    if len(dataset.version.item_files) <= ITEM_FILES:
        return dataset.version.item_files
    path = f"{ITEMS_FOLDER}/{number}/{dataset.digest[:16]}.parquet"
    with dataset.workspace.create(path) as stream:
        pq.write_table(dataset.items(), stream, compression="zstd")
    return [path]

"""All shards of an index answering as one: the two hops of L2D-L and the merge of L2D-G.

What is asked of the shards, and what becomes of their answers, is written once, as generators of `Hop`s that do not
know where the shards are: `ShardedIndex` asks those of one process in turn, a server may ask replicas in parallel.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any, NamedTuple, TypeVar

import numpy as np

from l2d_ray.core.decoding import (
    Float64,
    FloatArray,
    IntArray,
    ScoredItems,
    best_items,
    completed,
    global_cut,
)
from l2d_ray.core.space import LinearMap
from l2d_ray.errors import InputError
from l2d_ray.index.files import REMEDY, read_map
from l2d_ray.index.manifest import IndexManifest, snapshot_folder
from l2d_ray.index.shard import IndexShard
from l2d_ray.workspace import Workspace

T = TypeVar("T")


class Hop(NamedTuple):
    """A question to every shard; the answers are sent back as a list in the order of the shards."""

    method: str
    """Of IndexShard (of TrialShard, in `tuning`)."""
    arguments: list[tuple[Any, ...]]
    """For each shard."""


Hops = Generator[Hop, list[Any], list[ScoredItems]]


def global_hops(
    shards: int, queries_UD: Float64, k: int, exclude: Sequence[IntArray], allow: IntArray | None = None
) -> Hops:
    """L2D-G: each query's K best items, without its excluded ones and, where given, within `allow`."""
    found = yield Hop("nearest_items", [(queries_UD, k, exclude, allow)] * shards)
    return [best_items(parts, k) for parts in zip(*found, strict=True)]


def local_hops(
    shards: int, queries_UD: Float64, k: int, exclude: Sequence[IntArray], top_m: int, allow: IntArray | None = None
) -> Hops:
    """L2D-L over the `top_m` nearest rows, completed from L2D-G where that leaves fewer than K items."""
    neighbours = yield Hop("nearest_rows", [(queries_UD, top_m)] * shards)
    cuts = [global_cut(parts, top_m) for parts in zip(*neighbours, strict=True)]
    aggregated = yield Hop("aggregate_rows", [(queries_UD, own, cuts) for own in neighbours])
    found = [best_items(parts, sum(map(len, parts))) for parts in zip(*aggregated, strict=True)]
    lists = [items.permitted(out, allow) for items, out in zip(found, exclude, strict=True)]
    short = [user for user, items in enumerate(lists) if len(items) < k]
    if short:
        # What L2D-L has ranked takes places of L2D-G's list, too: ask for as many more.
        most = k + max(len(found[user]) for user in short)
        filling = yield from global_hops(shards, queries_UD[short], most, [exclude[user] for user in short], allow)
        for user, more in zip(short, filling, strict=True):
            lists[user] = completed(found[user], more, k, exclude[user], allow)
    return [ScoredItems(items.items_I[:k], items.scores_I[:k]) for items in lists]


@dataclass(frozen=True)
class IndexReader:
    """A complete index that is open for reading, shard by shard."""

    manifest: IndexManifest
    space: LinearMap
    workspace: Workspace
    _offset_D: Float64

    @classmethod
    def open(cls, workspace: Workspace, path: str) -> "IndexReader":
        """The index whose manifest is at `path`. Raises InputError, naming the file, for what is wrong."""
        manifest = IndexManifest.read(workspace, path)
        folder = PurePosixPath(path).parents[1].name
        if folder != snapshot_folder(manifest.snapshot, manifest.snapshot_digest):
            raise InputError(
                f"{workspace.path(path)}: is of snapshot {manifest.snapshot} with digest"
                f" {manifest.snapshot_digest[:8]}, but lies in {folder}, where another's belongs{REMEDY}"
            )
        listed = [shard.shard for shard in manifest.shards]
        if listed != list(range(manifest.identity.num_shards)):
            raise InputError(f"{workspace.path(path)}: lists shards {listed} of {manifest.identity.num_shards}{REMEDY}")
        space, offset_D = read_map(workspace, manifest.map)
        if offset_D.size != manifest.identity.dimension:
            raise InputError(
                f"{workspace.path(manifest.map.path)}: of dimension {offset_D.size}, expected"
                f" {manifest.identity.dimension}{REMEDY}"
            )
        return cls(manifest, space, workspace, offset_D)

    def shard(self, number: int, verify: bool = False) -> IndexShard:
        """One of its shards. Raises InputError, naming the file, for what is wrong; if `verify`, also for content that
        was not written with this index."""
        manifest = self.manifest
        return IndexShard.open(
            self.workspace, manifest.shards[number], self._offset_D, manifest.factory, manifest.search, verify
        )


@dataclass(frozen=True)
class ShardedIndex:
    """An index to search, in one process. Queries are hidden states [U, D], float16 or wider, not mapped yet."""

    space: LinearMap
    shards: Sequence[IndexShard]

    @classmethod
    def open(cls, workspace: Workspace, path: str) -> "ShardedIndex":
        """The complete index whose manifest is at `path`. Raises InputError, naming the file, for what is wrong."""
        reader = IndexReader.open(workspace, path)
        return cls(reader.space, [reader.shard(number) for number in range(len(reader.manifest.shards))])

    def with_prior(self, weight: float) -> "ShardedIndex":
        """The same index, whose L2D-G weighs an item's log-frequency (`IndexShard.with_prior`)."""
        rows = sum(shard.row_items_M.size for shard in self.shards)
        return replace(self, shards=[shard.with_prior(weight, rows) for shard in self.shards])

    def recommend_global(
        self, states_UD: FloatArray, k: int, exclude: Sequence[IntArray], allow: IntArray | None = None
    ) -> list[ScoredItems]:
        """`global_hops` over all shards."""
        return run(global_hops(len(self.shards), self.space(states_UD), k, exclude, allow), self.shards)

    def recommend_local(
        self, states_UD: FloatArray, k: int, exclude: Sequence[IntArray], top_m: int, allow: IntArray | None = None
    ) -> list[ScoredItems]:
        """`local_hops` over all shards."""
        return run(local_hops(len(self.shards), self.space(states_UD), k, exclude, top_m, allow), self.shards)


def dealt(shards: int, parts: int) -> list[range]:
    """The shards of each part; a part may have none."""
    bounds = np.linspace(0, shards, parts + 1).astype(int).tolist()
    return [range(start, stop) for start, stop in pairwise(bounds)]


def answers(shards: Sequence[Any], hop: Hop) -> list[Any]:
    """Of shards in this process, one after the other."""
    return [getattr(shard, hop.method)(*own) for shard, own in zip(shards, hop.arguments, strict=True)]


def run(hops: Generator[Hop, list[Any], T], shards: Sequence[Any]) -> T:
    """The result of all hops, by `answers`."""
    return follow(hops, lambda hop: answers(shards, hop))


def follow(hops: Generator[Hop, list[Any], T], ask: Callable[[Hop], list[Any]]) -> T:
    """The result of all hops, each answered by `ask`."""
    hop = next(hops)
    while True:
        try:
            hop = hops.send(ask(hop))
        except StopIteration as done:
            result: T = done.value
            return result

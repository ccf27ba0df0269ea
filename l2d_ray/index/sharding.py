"""All shards of an index in one process, answering as one: the two hops of L2D-L and the merge of L2D-G."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from l2d_ray.core.decoding import (
    Float64,
    FloatArray,
    IntArray,
    Neighbours,
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


@dataclass(frozen=True)
class ShardedIndex:
    """An index to search. Queries are hidden states [U, D], float16 or wider, not mapped yet."""

    space: LinearMap
    shards: Sequence[IndexShard]

    @classmethod
    def open(cls, workspace: Workspace, path: str) -> "ShardedIndex":
        """The complete index whose manifest is at `path`. Raises InputError, naming the file, for what is wrong."""
        manifest = IndexManifest.read(workspace, path)
        folder = PurePosixPath(path).parents[1].name
        if folder != snapshot_folder(manifest.snapshot, manifest.snapshot_digest):
            raise InputError(
                f"{workspace.path(path)}: is of snapshot {manifest.snapshot} with digest"
                f" {manifest.snapshot_digest[:8]}, but lies in {folder}, where another's belongs{REMEDY}"
            )
        if len(manifest.shards) != manifest.identity.num_shards:
            raise InputError(
                f"{workspace.path(path)}: lists {len(manifest.shards)} shards of {manifest.identity.num_shards}{REMEDY}"
            )
        space, offset_D = read_map(workspace, manifest.map)
        if offset_D.size != manifest.identity.dimension:
            raise InputError(
                f"{workspace.path(manifest.map.path)}: of dimension {offset_D.size}, expected"
                f" {manifest.identity.dimension}{REMEDY}"
            )
        arguments = offset_D, manifest.factory, manifest.search
        return cls(space, [IndexShard.open(workspace, shard, *arguments) for shard in manifest.shards])

    def with_prior(self, weight: float) -> "ShardedIndex":
        """The same index, whose L2D-G weighs an item's log-frequency (`IndexShard.with_prior`)."""
        rows = sum(shard.row_items_M.size for shard in self.shards)
        return replace(self, shards=[shard.with_prior(weight, rows) for shard in self.shards])

    def recommend_global(
        self, states_UD: FloatArray, k: int, exclude: Sequence[IntArray], allow: IntArray | None = None
    ) -> list[ScoredItems]:
        """L2D-G: each query's K best items, without its excluded ones and, where given, within `allow`."""
        return self._global(self.space(states_UD), k, exclude, allow)

    def recommend_local(
        self, states_UD: FloatArray, k: int, exclude: Sequence[IntArray], top_m: int, allow: IntArray | None = None
    ) -> list[ScoredItems]:
        """L2D-L over the `top_m` nearest rows, completed from L2D-G where that leaves fewer than K items."""
        queries_UD = self.space(states_UD)
        found = self._local(queries_UD, top_m)
        lists = [items.permitted(out, allow) for items, out in zip(found, exclude, strict=True)]
        short = [user for user, items in enumerate(lists) if len(items) < k]
        if short:
            # What L2D-L has ranked takes places of L2D-G's list, too: ask for as many more.
            most = k + max(len(found[user]) for user in short)
            filling = self._global(queries_UD[short], most, [exclude[user] for user in short], allow)
            for user, more in zip(short, filling, strict=True):
                lists[user] = completed(found[user], more, k, exclude[user], allow)
        return [ScoredItems(items.items_I[:k], items.scores_I[:k]) for items in lists]

    def _global(
        self, queries_UD: Float64, k: int, exclude: Sequence[IntArray], allow: IntArray | None
    ) -> list[ScoredItems]:
        found = [shard.nearest_items(queries_UD, k, exclude, allow) for shard in self.shards]
        return [best_items(parts, k) for parts in zip(*found, strict=True)]

    def _local(self, queries_UD: Float64, top_m: int) -> list[ScoredItems]:
        """All items of the `top_m` nearest rows, in two hops."""
        hops = [shard.nearest_rows(queries_UD, top_m) for shard in self.shards]
        return [self._second_hop(query_D, parts, top_m) for query_D, *parts in zip(queries_UD, *hops, strict=True)]

    def _second_hop(self, query_D: Float64, parts: Sequence[Neighbours], top_m: int) -> ScoredItems:
        cut = global_cut(parts, top_m)
        items = [s.aggregate_rows(query_D, part, cut) for s, part in zip(self.shards, parts, strict=True)]
        return best_items(items, sum(map(len, items)))

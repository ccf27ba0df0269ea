"""An index that is open for reading, and the search over all its shards in one process."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from l2d_ray.core.arrays import Float64, FloatArray
from l2d_ray.core.decoding import ScoredItems
from l2d_ray.core.explanation import ItemExplanation
from l2d_ray.core.query import History, Query
from l2d_ray.core.space import LinearMap
from l2d_ray.errors import InputError
from l2d_ray.index import aggregations
from l2d_ray.index.aggregations import l2d_local
from l2d_ray.index.exchange import run
from l2d_ray.index.explanation import explain
from l2d_ray.index.files import REMEDY, read_map
from l2d_ray.index.manifest import IndexManifest, PosteriorRecord, posterior_path, snapshot_folder
from l2d_ray.index.shard import IndexShard, OpenSegments
from l2d_ray.workspace import Workspace


@dataclass(frozen=True)
class IndexReader:
    """A complete index that is read shard by shard."""

    manifest: IndexManifest
    space: LinearMap
    workspace: Workspace
    _offset_D: Float64
    posterior: PosteriorRecord | None = None
    """The parameters of the aggregation `posterior`; None if they were not fitted."""

    @classmethod
    def open(cls, workspace: Workspace, path: str) -> "IndexReader":
        """Open the index whose manifest is at `path`. Raises InputError, naming the file, if it is damaged."""
        manifest = IndexManifest.read(workspace, path)
        folder = PurePosixPath(path).parents[1].name
        if folder != snapshot_folder(manifest.snapshot, manifest.snapshot_digest):
            raise InputError(
                f"{workspace.path(path)}: belongs to snapshot {manifest.snapshot} with digest"
                f" {manifest.snapshot_digest[:8]}, but is in the folder {folder}{REMEDY}"
            )
        listed = [shard.shard for shard in manifest.shards]
        if listed != list(range(manifest.identity.num_shards)):
            raise InputError(
                f"{workspace.path(path)}: lists shards {listed}, expected {manifest.identity.num_shards}{REMEDY}"
            )
        space, offset_D = read_map(workspace, manifest.fitted.map)
        if offset_D.size != manifest.identity.dimension:
            raise InputError(
                f"{workspace.path(manifest.fitted.map.path)}: has dimension {offset_D.size}, expected"
                f" {manifest.identity.dimension}{REMEDY}"
            )
        return cls(manifest, space, workspace, offset_D, _read_posterior(workspace, posterior_path(path), len(listed)))

    @property
    def digest(self) -> str:
        """Digest of all records of the index, which decide every answer."""
        digest = self.manifest.digest()
        return hashlib.sha256((digest + self.posterior.digest()).encode()).hexdigest() if self.posterior else digest

    def shard(self, number: int, verify: bool = False, opened: OpenSegments | None = None) -> IndexShard:
        """Open one shard. Raises InputError, naming the file, if a file is damaged.

        `verify` also compares every file with its checksum. `opened` has segments that need not be read again.
        """
        record, search = self.manifest.shards[number], self.manifest.search
        return IndexShard.open(self.workspace, record, self._offset_D, search, verify, self.posterior, opened)


def _read_posterior(workspace: Workspace, path: str, num_shards: int) -> PosteriorRecord | None:
    if not workspace.exists(path):
        return None
    posterior = PosteriorRecord.read(workspace, path)
    listed = [transitions.shard for transitions in posterior.transitions]
    if listed != list(range(num_shards)):
        raise InputError(f"{workspace.path(path)}: lists shards {listed}, expected {num_shards}{REMEDY}")
    return posterior


@dataclass(frozen=True)
class ShardedIndex:
    """An index in one process. States are hidden states [U, D] of queries, float16 or wider, not mapped yet."""

    space: LinearMap
    shards: Sequence[IndexShard]

    @classmethod
    def open(cls, workspace: Workspace, path: str) -> "ShardedIndex":
        """Open the index whose manifest is at `path`. Raises InputError, naming the file, if it is damaged."""
        reader = IndexReader.open(workspace, path)
        return cls(reader.space, [reader.shard(number) for number in range(len(reader.manifest.shards))])

    def with_prior(self, weight: float) -> "ShardedIndex":
        """Return the index with a prior for L2D-G: the weight of an item's log-frequency (`IndexShard.with_prior`)."""
        rows = sum(shard.num_rows for shard in self.shards)
        return replace(self, shards=[shard.with_prior(weight, rows) for shard in self.shards])

    def recommend(self, states_UD: FloatArray, queries: Sequence[Query]) -> list[ScoredItems]:
        """Return for each query its K best permitted items, by the aggregation that it names."""
        return run(aggregations.recommend(self.space(states_UD), queries), self.shards)

    def explain(self, state_D: FloatArray, history: History, found: ScoredItems) -> dict[int, ItemExplanation]:
        """Explain items that the aggregation `posterior` has found for a history; by item."""
        return run(explain(self.space(state_D[None])[0], history, found), self.shards)

    def recommend_at(
        self, states_UD: FloatArray, queries: Sequence[Query], top_ms: Sequence[int], aggregation: str = l2d_local.NAME
    ) -> list[list[ScoredItems]]:
        """Return the lists of an aggregation for each value of M, from one search if it can.

        `aggregation` and `top_m` of the queries are ignored.
        """
        return run(aggregations.recommend_at(aggregation, self.space(states_UD), queries, top_ms), self.shards)

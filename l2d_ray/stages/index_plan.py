"""The plan of an index: the snapshot, the settings and the paths that every step of building it needs."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePosixPath

import pyarrow as pa

from l2d_ray.config import Config, IndexConfig
from l2d_ray.core.decay import NO_DAY
from l2d_ray.core.moments import ItemSums
from l2d_ray.core.samples import in_fraction
from l2d_ray.data.dataset import Dataset
from l2d_ray.encoding import identify_memory
from l2d_ray.errors import InputError
from l2d_ray.index.engine import engine
from l2d_ray.index.manifest import FOLDER, label, posterior_path, snapshot_folder
from l2d_ray.index.moments import ShardMoments, read_newest_day
from l2d_ray.memory.manifest import Snapshot, live_name
from l2d_ray.memory.store import MemoryStore
from l2d_ray.records import check_query
from l2d_ray.workspace import Workspace


@dataclass(frozen=True)
class IndexPlan:
    """The index of one snapshot with one set of settings."""

    uri: str
    """Location of the workspace."""
    snapshot: Snapshot
    config: IndexConfig
    factory: str
    """`index.factory` with `auto` resolved."""

    @property
    def workspace(self) -> Workspace:
        """The workspace, opened."""
        return Workspace.open(self.uri)

    @property
    def base(self) -> str:
        """Folder of all indexes of the snapshot."""
        return f"{FOLDER}/{snapshot_folder(self.snapshot.number, self.snapshot.digest())}"

    @property
    def folder(self) -> str:
        """Folder of this index."""
        config = self.config
        parts = config.space, config.shrinkage, self.factory, config.sample_fraction, config.half_life_days
        return f"{self.base}/{label(*parts)}"

    @property
    def manifest(self) -> str:
        """Path of the record that completes the index. The recall it is tuned to is part of the name."""
        return f"{self.folder}/index-{self.config.target_recall!r}.json"

    @property
    def num_shards(self) -> int:
        """Number of shards, of the memory and the index alike."""
        return self.snapshot.identity.num_shards

    @property
    def dimension(self) -> int:
        """Length of a row."""
        return self.snapshot.identity.dimension

    def shard_record(self, shard: int) -> str:
        """Return the path of the record that completes a shard."""
        return f"{self.folder}/shard={shard}.json"

    @property
    def posterior(self) -> str:
        """Path of the parameters of the aggregation `posterior`."""
        return posterior_path(self.manifest)

    def transitions(self, shard: int) -> str:
        """Return the path of the record of the transitions to the items of a shard."""
        return f"{self.base}/transitions/{self._of_half_life}shard={shard}.json"

    def item_means(self, shard: int, attempt: str) -> str:
        """Return the path of the item means of a shard for the aggregation `posterior`."""
        return f"{self.base}/means/{PurePosixPath(self.folder).name}/shard={shard}-{attempt}.npy"

    def moments(self, shard: int) -> str:
        """Return the path of the sums of a shard, which the indexes of a snapshot share."""
        return self.moments_below(self.base, shard)

    def moments_below(self, base: str, shard: int) -> str:
        """Return that path for another snapshot, given the folder of all its indexes."""
        return f"{base}/moments/{self.config.sample_fraction!r}/{self._of_half_life}shard={shard}.npz"

    @property
    def _of_half_life(self) -> str:
        half_life = self.config.half_life_days
        return f"half-life-{half_life!r}/" if half_life else ""

    @cached_property
    def newest_day(self) -> int:
        """Day of the newest row of all shards, from which ages are counted; any day without a half-life.

        The sums of all shards must be there.
        """
        if not self.config.half_life_days:
            return NO_DAY
        return max(read_newest_day(self.workspace, self.moments(shard)) for shard in range(self.num_shards))

    def item_sums(self, shard: int) -> ItemSums:
        """Return the sums that the item means of a shard are estimated from. The sums of all shards must be there."""
        return ShardMoments.read(self.workspace, self.moments(shard)).item_sums(self.newest_day)

    @property
    def units(self) -> list[str]:
        """Names of the rows of the snapshot's units. Rows of the same name are the same in every snapshot."""
        return [live_name(unit, self.snapshot.deletions.get(unit)) for unit in self.snapshot.units]

    def rows(
        self,
        shard: int,
        columns: list[str] | None = None,
        fraction: float = 1.0,
        units: Collection[str] | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a shard that the index contains, or a fraction of them, always in the same order.

        `units` are those of `self.units` to read; None stands for all.
        """
        kept, snapshot = self.config.sample_fraction * fraction, self.snapshot
        if units is not None:
            chosen = [unit for unit, name in zip(snapshot.units, self.units, strict=True) if name in units]
            snapshot = snapshot.model_copy(update={"units": chosen})
        for rows in MemoryStore(self.workspace).read(snapshot, shard, columns):
            if kept < 1:
                rows = rows.filter(pa.array(in_fraction(rows.column("sample_id").to_numpy(), kept)))
            if rows.num_rows:
                yield rows

    def older(self) -> Iterator["IndexPlan"]:
        """Yield the plans of the same index for the snapshots that this one may have grown from, the newest first.

        They are of the same model and share a unit or the dataset.
        """
        store, snapshot = MemoryStore(self.workspace), self.snapshot
        for number in reversed(store.snapshot_numbers()):
            if number < snapshot.number:
                older = store.snapshot(number)
                shared = older.dataset == snapshot.dataset or not set(older.units).isdisjoint(snapshot.units)
                alike = (older.identity, older.sample_fraction) == (snapshot.identity, snapshot.sample_fraction)
                if shared and alike:
                    yield replace(self, snapshot=older)


def plan_index(config: Config) -> IndexPlan:
    """Plan the index that `config` describes. Raises InputError if there is no memory or it has no rows."""
    workspace = Workspace.open(config.workspace)
    snapshot = MemoryStore(workspace).snapshot(config.index.snapshot)
    if snapshot.rows == 0:
        raise InputError(
            f"{workspace.path('memory')}: snapshot {snapshot.number} has no rows; see memory/quarantine for the reasons"
        )
    dimension = snapshot.identity.dimension
    factory = resolve_factory(config.index, snapshot.rows, snapshot.identity.num_shards, dimension)
    engine.create(factory, dimension)  # refuses a factory string that does not fit
    return IndexPlan(workspace.uri, snapshot, config.index, factory)


def resolve_factory(config: IndexConfig, rows: int, num_shards: int, dimension: int) -> str:
    """Return `index.factory` for a memory with this many rows; `auto` depends on the rows of a shard."""
    if config.factory != "auto":
        return config.factory
    return engine.default_factory(round(rows * config.sample_fraction / num_shards), dimension)


def dataset_of(plan: IndexPlan) -> Dataset:
    """Return the version of the dataset from which the memory was built.

    Raises InputError if the workspace has another dataset now.
    """
    newest = Dataset.open(plan.workspace)
    if plan.snapshot.dataset not in newest.version.lineage:
        raise InputError(
            f"{newest.workspace.path('dataset')}: snapshot {plan.snapshot.number} of the memory was built from another"
            " dataset; run jobs/build_memory.py again, or name its snapshot with index.snapshot"
        )
    return Dataset.open(plan.workspace, plan.snapshot.dataset)


def with_snapshot(config: Config) -> Config:
    """Name the memory's snapshot in the configuration.

    Raises InputError as `plan_index` does, and if the snapshot is of another dataset or of another model.
    """
    plan = plan_index(config)
    dataset_of(plan)
    check_query(plan.snapshot.identity, identify_memory(config))
    return config.replace({"index.snapshot": plan.snapshot.number})

"""From a memory's snapshot to an index, without Ray: the work on one shard, and what needs all of them.

1. `sum_moments`, for each shard: item sums and second moments of its rows.
2. `fit`, once: the map of the space, and an index trained on a sample of all shards if it needs training.
3. `build_shard`, for each shard: mapped rows, item means, and their FAISS index.
4. `index.tuning` over all shards, wherever they are (`open_shard`): the search setting that reaches the recall asked
   for, measured; and `finish`, once: the manifest.

Every step leaves files and skips what is there, so that a run that was killed is finished by the same command. A step
may be attempted twice at once (a worker believed dead, say): attempts write files of their own, and the first to write
its record wins.
"""

import logging
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from l2d_ray.config import Config, IndexConfig
from l2d_ray.core.aggregation import Moments, add_rows
from l2d_ray.core.samples import in_fraction
from l2d_ray.core.space import fit_map, fit_means
from l2d_ray.data.dataset import Dataset
from l2d_ray.errors import InputError
from l2d_ray.index import faiss_index
from l2d_ray.index.files import (
    read_bytes,
    read_map,
    read_means,
    write_array,
    write_bytes,
    write_map,
    write_means,
)
from l2d_ray.index.manifest import (
    FOLDER,
    IndexFile,
    IndexManifest,
    IndexQuality,
    ShardRecord,
    label,
    snapshot_folder,
)
from l2d_ray.index.moments import ShardMoments
from l2d_ray.index.shard import IndexShard
from l2d_ray.memory.manifest import Snapshot
from l2d_ray.memory.store import MemoryStore
from l2d_ray.records import Record
from l2d_ray.schema import hidden_states
from l2d_ray.workspace import Workspace

logger = logging.getLogger(__name__)
R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class IndexPlan:
    """What every step needs to know."""

    workspace: str
    snapshot: Snapshot
    config: IndexConfig
    factory: str
    """`index.factory` with `auto` decided."""

    @property
    def base(self) -> str:
        """The folder of all indexes of this snapshot."""
        return f"{FOLDER}/{snapshot_folder(self.snapshot.number, self.snapshot.digest())}"

    @property
    def folder(self) -> str:
        """The folder of this index."""
        config = self.config
        return f"{self.base}/{label(config.space, config.shrinkage, self.factory, config.sample_fraction)}"

    @property
    def manifest(self) -> str:
        """The path of the record that makes the index complete; what it was tuned to is part of its name."""
        return f"{self.folder}/index-{self.config.target_recall!r}.json"

    @property
    def num_shards(self) -> int:
        """Shards of memory and index alike."""
        return self.snapshot.identity.num_shards


class Fitted(Record):
    """What step 2 leaves for step 3. Written once: shards of two maps would not fit together."""

    map: IndexFile
    means: IndexFile
    trained: IndexFile


def plan_index(config: Config) -> IndexPlan:
    """The plan of the index that `config` describes. Raises InputError if there is no memory or it has no rows."""
    workspace = Workspace.open(config.workspace)
    snapshot = MemoryStore(workspace).snapshot(config.index.snapshot)
    rows = snapshot.rows * config.index.sample_fraction
    if snapshot.rows == 0:
        raise InputError(
            f"{workspace.path('memory')}: snapshot {snapshot.number} has no rows; memory/quarantine says why"
        )
    dimension = snapshot.identity.dimension
    factory = config.index.factory
    if factory == "auto":
        factory = faiss_index.default_factory(round(rows / snapshot.identity.num_shards), dimension)
    faiss_index.empty_index(factory, dimension)
    return IndexPlan(workspace.uri, snapshot, config.index, factory)


def dataset_of(plan: IndexPlan) -> Dataset:
    """The dataset that the memory is of. Raises InputError if the workspace has another one now."""
    dataset = Dataset.open(Workspace.open(plan.workspace))
    if dataset.digest != plan.snapshot.dataset:
        raise InputError(
            f"snapshot {plan.snapshot.number} of the memory is of another dataset than"
            f" {dataset.workspace.path('dataset')}; run jobs/build_memory.py again, or name its snapshot with"
            " index.snapshot"
        )
    return dataset


def sum_moments(plan: IndexPlan, shard: int) -> None:
    """Step 1."""
    workspace, path = Workspace.open(plan.workspace), _moments_path(plan, shard)
    if workspace.exists(path):
        return
    occurring = [rows.column("item_index").to_numpy() for rows in _read(plan, shard, ["sample_id", "item_index"])]
    items = np.unique(np.concatenate([np.empty(0, np.int32), *occurring]))
    dimension = plan.snapshot.identity.dimension
    sums, counts = np.zeros((items.size, dimension)), np.zeros(items.size, np.int64)
    moments = Moments.zero(dimension)
    for rows in _read(plan, shard):
        states = hidden_states(rows)
        add_rows(sums, counts, states, np.searchsorted(items, rows.column("item_index").to_numpy()))
        moments += Moments.of_rows(states)
    moments += Moments.of_items(sums, counts)
    ShardMoments(items, counts, sums, moments).write(workspace, path)


def fit(plan: IndexPlan) -> Fitted:
    """Step 2."""
    workspace, record_path = Workspace.open(plan.workspace), f"{plan.folder}/fitted.json"
    if workspace.exists(record_path):
        return Fitted.read(workspace, record_path)
    parts = (ShardMoments.read(workspace, _moments_path(plan, shard)).moments for shard in range(plan.num_shards))
    moments = sum(parts, Moments.zero(plan.snapshot.identity.dimension))
    if moments.rows == 0:
        raise InputError(f"index.sample_fraction={plan.config.sample_fraction}: leaves no row; raise it")
    try:
        space = fit_map(moments, plan.config.space, plan.config.shrinkage)
    except ValueError as error:
        raise InputError(f"index.space={plan.config.space!r}: {error}; use index.space=none") from None
    mean_D = moments.sum_D / moments.rows
    offset_D = mean_D if space.mean_D is None else np.zeros_like(mean_D)
    index = faiss_index.empty_index(plan.factory, mean_D.size)
    wanted = faiss_index.training_rows(index)
    if wanted:
        blocks = [(space(rows) - offset_D).astype(np.float32) for rows in _sample(plan, wanted / moments.rows)]
        sample_MD = np.concatenate(blocks)
        try:
            faiss_index.train(index, sample_MD)
        except RuntimeError as error:
            raise InputError(
                f"index.factory={plan.factory!r}: cannot be trained on {len(sample_MD)} rows"
                f" ({faiss_index.reason(error)}); use index.factory=Flat"
            ) from None
    attempt = uuid.uuid4().hex[:8]
    fitted = Fitted(
        map=write_map(workspace, f"{plan.folder}/space-{attempt}.npz", space, offset_D),
        means=write_means(
            workspace, f"{plan.folder}/means-{attempt}.npz", fit_means(moments, plan.config.space, space)
        ),
        trained=write_bytes(workspace, f"{plan.folder}/trained-{attempt}.faiss", [faiss_index.to_bytes(index)]),
    )
    return _commit(fitted, workspace, record_path)


def build_shard(plan: IndexPlan, fitted: Fitted, shard: int) -> ShardRecord:
    """Step 3."""
    workspace, record_path = Workspace.open(plan.workspace), f"{plan.folder}/shard={shard}.json"
    if workspace.exists(record_path):
        return ShardRecord.read(workspace, record_path)
    started, folder = time.monotonic(), f"{plan.folder}/shard={shard}/{uuid.uuid4().hex[:8]}"
    space, offset_D = read_map(workspace, fitted.map)
    part, dimension = ShardMoments.read(workspace, _moments_path(plan, shard)), plan.snapshot.identity.dimension
    count, items = part.moments.rows, part.moments.items
    index = faiss_index.from_bytes(read_bytes(workspace, fitted.trained))
    add = faiss_index.adding_to(index)
    row_items, sample_ids = np.empty(count, np.int32), np.empty(count, np.int64)

    def mapped() -> Iterator[NDArray[np.float16]]:
        """The rows as they are stored, added to the index as they pass."""
        start = 0
        for rows in _read(plan, shard):
            stop = start + rows.num_rows
            row_items[start:stop], sample_ids[start:stop] = rows.column("item_index"), rows.column("sample_id")
            start = stop
            states = hidden_states(rows)
            states = states if plan.config.space == "none" else space(states).astype(np.float16)
            if not np.isfinite(states).all():
                raise InputError(
                    f"index.space={plan.config.space!r}: mapped rows do not fit into float16; raise index.shrinkage"
                )
            try:
                add((states - offset_D).astype(np.float32))
            except RuntimeError as error:
                raise InputError(
                    f"index.factory={plan.factory!r}: FAISS cannot add rows to it block by block"
                    f" ({faiss_index.reason(error)}); use another"
                ) from None
            yield states

    def write(name: str, shape: tuple[int, ...], dtype: Any, parts: Any) -> IndexFile:
        return write_array(workspace, f"{folder}/{name}.npy", shape, dtype, parts)

    means = read_means(workspace, fitted.means)(space(part.sums_ID / part.counts_I[:, None]), part.counts_I)
    files = {
        "rows": write("rows", (count, dimension), np.float16, mapped()),
        "row_items": write("row_items", (count,), np.int32, [row_items]),
        "sample_ids": write("sample_ids", (count,), np.int64, [sample_ids]),
        "items": write("items", (items,), np.int32, [part.items_I]),
        "counts": write("counts", (items,), np.int64, [part.counts_I]),
        "centroids": write("centroids", (items, dimension), np.float32, [means]),
    }
    files["faiss"] = write_bytes(workspace, f"{folder}/rows.faiss", [faiss_index.to_bytes(index)])
    seconds = round(time.monotonic() - started, 3)
    record = ShardRecord(
        shard=shard, rows=count, items=items, files=files, faiss_version=faiss.__version__, seconds=seconds
    )
    return _commit(record, workspace, record_path)


def open_shard(plan: IndexPlan, fitted: Fitted, shard: ShardRecord) -> IndexShard:
    """Open a shard for step 4."""
    workspace = Workspace.open(plan.workspace)
    _, offset_D = read_map(workspace, fitted.map)
    return IndexShard.open(workspace, shard, offset_D, plan.factory)


def finish(
    plan: IndexPlan,
    fitted: Fitted,
    shards: Sequence[ShardRecord],
    tuned: tuple[str, IndexQuality],
    started: float,
) -> IndexManifest:
    """Step 4, after `find_setting` gave what it was `tuned` to. `started` is the `time.time()` of the run's start."""
    workspace, rows = Workspace.open(plan.workspace), sum(shard.rows for shard in shards)
    search, quality = tuned
    if quality.recall_top_k < plan.config.target_recall:
        logger.warning(
            "%s finds %.4f of the exact top %d at best, less than index.target_recall=%s",
            plan.factory,
            quality.recall_top_k,
            quality.k,
            plan.config.target_recall,
        )
    manifest = IndexManifest(
        snapshot=plan.snapshot.number,
        snapshot_digest=plan.snapshot.digest(),
        dataset=plan.snapshot.dataset,
        identity=plan.snapshot.identity,
        sample_fraction=plan.config.sample_fraction,
        space=plan.config.space,
        shrinkage=plan.config.shrinkage,
        factory=plan.factory,
        search=search,
        target_recall=plan.config.target_recall,
        map=fitted.map,
        rows=rows,
        items=sum(shard.items for shard in shards),
        bytes_per_row=round(sum(f.bytes for s in shards for f in s.files.values()) / rows, 1),
        quality=quality,
        shards=list(shards),
        seconds=round(time.time() - started, 3),
    )
    _remove_strays(workspace, plan, fitted, shards)
    return _commit(manifest, workspace, plan.manifest)


def _commit(record: R, workspace: Workspace, path: str) -> R:
    """Write a record, or return the one that another attempt wrote first."""
    try:
        record.write(workspace, path)
    except FileExistsError:
        return type(record).read(workspace, path)
    return record


def _remove_strays(workspace: Workspace, plan: IndexPlan, fitted: Fitted, shards: Sequence[ShardRecord]) -> None:
    """Remove what attempts left behind that were killed or came second."""
    files = [fitted.map, fitted.means, fitted.trained, *(file for shard in shards for file in shard.files.values())]
    keep = {file.path for file in files}
    for path in workspace.files(plan.folder):
        if path not in keep and not path.endswith(".json"):
            workspace.delete(path)


def _moments_path(plan: IndexPlan, shard: int) -> str:
    return f"{plan.base}/moments/{plan.config.sample_fraction!r}/shard={shard}.npz"


def _sample(plan: IndexPlan, share: float) -> Iterator[NDArray[np.float16]]:
    """About this share of the rows of all shards."""
    for shard in range(plan.num_shards):
        for rows in _read(plan, shard, fraction=min(1.0, share)):
            yield hidden_states(rows)


def _read(
    plan: IndexPlan, shard: int, columns: list[str] | None = None, fraction: float = 1.0
) -> Iterator[pa.RecordBatch]:
    """The rows of a shard that the index takes, always in the same order; of these the given share."""
    store = MemoryStore(Workspace.open(plan.workspace))
    kept = plan.config.sample_fraction * fraction
    for rows in store.read(plan.snapshot, shard, columns):
        if kept < 1:
            rows = rows.filter(pa.array(in_fraction(rows.column("sample_id").to_numpy(), kept)))
        if rows.num_rows:
            yield rows

"""The index stage without Ray: the steps from a snapshot of a memory to an index.

1. `sum_moments`, per shard: item sums and second moments of its rows.
2. `fit`, once: the map of the space, and an empty index, trained on a sample of all shards if it needs training.
3. `build_shard`, per shard: mapped rows, item means and the index of the rows.
4. `index.tuning` over all shards (`open_shard`): the search setting that reaches the target recall.
5. `finish`, once: the manifest.

Every step leaves files and skips those that are there, so the same command completes a run that was killed. A step may
be attempted twice at the same time, for instance if a worker was believed dead. Attempts write separate files, and the
first to write its record wins.
"""

import logging
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from l2d_ray.core.arrays import Float64
from l2d_ray.core.moments import Moments, add_rows
from l2d_ray.core.space import LinearMap, fit_map, fit_means
from l2d_ray.errors import InputError
from l2d_ray.index.engine import CandidateIndex, engine
from l2d_ray.index.files import read_bytes, read_map, read_means, write_array, write_bytes, write_map, write_means
from l2d_ray.index.manifest import IndexFile, IndexManifest, IndexQuality, ShardRecord
from l2d_ray.index.moments import ShardMoments
from l2d_ray.index.shard import IndexShard
from l2d_ray.records import Record
from l2d_ray.schema import hidden_states
from l2d_ray.stages.index_plan import IndexPlan
from l2d_ray.workspace import Workspace

logger = logging.getLogger(__name__)
R = TypeVar("R", bound=Record)


class Fitted(Record):
    """The files of `fit`. Written once: shards with different maps would not fit together."""

    map: IndexFile
    means: IndexFile
    trained: IndexFile


def sum_moments(plan: IndexPlan, shard: int) -> None:
    """Sum the item vectors and moments of a shard; skip a shard that is done."""
    if plan.workspace.exists(plan.moments(shard)):
        return
    occurring = [rows.column("item_index").to_numpy() for rows in plan.rows(shard, ["sample_id", "item_index"])]
    items_I = np.unique(np.concatenate([np.empty(0, np.int32), *occurring]))
    sums_ID, counts_I = np.zeros((items_I.size, plan.dimension)), np.zeros(items_I.size, np.int64)
    moments = Moments.zero(plan.dimension)
    for rows in plan.rows(shard):
        states_MD = hidden_states(rows)
        add_rows(sums_ID, counts_I, states_MD, np.searchsorted(items_I, rows.column("item_index").to_numpy()))
        moments += Moments.of_rows(states_MD)
    moments += Moments.of_items(sums_ID, counts_I)
    ShardMoments(items_I, counts_I, sums_ID, moments).write(plan.workspace, plan.moments(shard))


def fit(plan: IndexPlan) -> Fitted:
    """Fit the map of the space to the moments of all shards, and train an empty index; skip what is done."""
    workspace, record_path = plan.workspace, f"{plan.folder}/fitted.json"
    if workspace.exists(record_path):
        return Fitted.read(workspace, record_path)
    parts = (ShardMoments.read(workspace, plan.moments(shard)).moments for shard in range(plan.num_shards))
    moments = sum(parts, Moments.zero(plan.dimension))
    if moments.rows == 0:
        raise InputError(f"index.sample_fraction={plan.config.sample_fraction}: leaves no rows; raise it")
    try:
        space = fit_map(moments, plan.config.space, plan.config.shrinkage)
    except ValueError as error:
        raise InputError(f"index.space={plan.config.space!r}: {error}; use index.space=none") from None
    mean_D = moments.sum_D / moments.rows
    offset_D = mean_D if space.mean_D is None else np.zeros_like(mean_D)
    means, trained = fit_means(moments, plan.config.space, space), _train(plan, space, offset_D, moments.rows)
    attempt = uuid.uuid4().hex[:8]
    fitted = Fitted(
        map=write_map(workspace, f"{plan.folder}/space-{attempt}.npz", space, offset_D),
        means=write_means(workspace, f"{plan.folder}/means-{attempt}.npz", means),
        trained=write_bytes(workspace, f"{plan.folder}/trained-{attempt}.faiss", [trained.to_bytes()]),
    )
    return commit(fitted, workspace, record_path)


def _train(plan: IndexPlan, space: LinearMap, offset_D: Float64, rows: int) -> CandidateIndex:
    """Return an empty index, trained on a sample of the rows of all shards if it needs training."""
    index = engine.create(plan.factory, plan.dimension)
    wanted = index.training_rows()
    if not wanted:
        return index
    fraction = min(1.0, wanted / rows)
    batches = (batch for shard in range(plan.num_shards) for batch in plan.rows(shard, fraction=fraction))
    sample_MD = np.concatenate([(space(hidden_states(batch)) - offset_D).astype(np.float32) for batch in batches])
    try:
        index.train(sample_MD)
    except ValueError as error:
        raise InputError(
            f"index.factory={plan.factory!r}: cannot be trained on {len(sample_MD)} rows ({error}); use"
            " index.factory=Flat"
        ) from None
    return index


def build_shard(plan: IndexPlan, fitted: Fitted, shard: int) -> ShardRecord:
    """Map the rows of a shard, index them and estimate its items; skip a shard that is done."""
    workspace, record_path = plan.workspace, plan.shard_record(shard)
    if workspace.exists(record_path):
        return ShardRecord.read(workspace, record_path)
    started, folder = time.monotonic(), f"{plan.folder}/shard={shard}/{uuid.uuid4().hex[:8]}"
    space, offset_D = read_map(workspace, fitted.map)
    sums = ShardMoments.read(workspace, plan.moments(shard))
    index = engine.from_bytes(read_bytes(workspace, fitted.trained))
    means_ID = read_means(workspace, fitted.means)(space(sums.sums_ID / sums.counts_I[:, None]), sums.counts_I)
    files = _write_rows(plan, shard, folder, sums.moments.rows, space, offset_D, index)
    arrays: dict[str, NDArray[Any]] = {"items": sums.items_I, "counts": sums.counts_I}
    arrays["centroids"] = means_ID.astype(np.float32)
    for name, array in arrays.items():
        files[name] = write_array(workspace, f"{folder}/{name}.npy", array.shape, array.dtype, [array])
    files["faiss"] = write_bytes(workspace, f"{folder}/rows.faiss", [index.to_bytes()])
    record = ShardRecord(
        shard=shard,
        rows=sums.moments.rows,
        items=sums.moments.items,
        files=files,
        faiss_version=engine.VERSION,
        seconds=round(time.monotonic() - started, 3),
    )
    return commit(record, workspace, record_path)


def _write_rows(
    plan: IndexPlan,
    shard: int,
    folder: str,
    count: int,
    space: LinearMap,
    offset_D: Float64,
    index: CandidateIndex,
) -> dict[str, IndexFile]:
    """Write the mapped rows of a shard, their items and their sample ids, and add the rows to `index`."""
    row_items: list[NDArray[np.int32]] = []
    sample_ids: list[NDArray[np.int64]] = []

    def mapped_rows() -> Iterator[NDArray[np.float16]]:
        for rows in plan.rows(shard):
            row_items.append(np.array(rows.column("item_index")))
            sample_ids.append(np.array(rows.column("sample_id")))
            mapped_MD = _mapped(plan, space, hidden_states(rows))
            _add(plan, index, mapped_MD - offset_D)
            yield mapped_MD

    def write(name: str, shape: tuple[int, ...], dtype: DTypeLike, parts: Iterable[NDArray[Any]]) -> IndexFile:
        return write_array(plan.workspace, f"{folder}/{name}.npy", shape, dtype, parts)

    return {
        "rows": write("rows", (count, plan.dimension), np.float16, mapped_rows()),  # fills the lists of the next two
        "row_items": write("row_items", (count,), np.int32, row_items),
        "sample_ids": write("sample_ids", (count,), np.int64, sample_ids),
    }


def _mapped(plan: IndexPlan, space: LinearMap, states_MD: NDArray[np.float16]) -> NDArray[np.float16]:
    """Return the rows as the index stores them."""
    if plan.config.space == "none":
        return states_MD
    mapped_MD = space(states_MD).astype(np.float16)
    if not np.isfinite(mapped_MD).all():
        raise InputError(
            f"index.space={plan.config.space!r}: mapped rows exceed the range of float16; raise index.shrinkage"
        )
    return mapped_MD


def _add(plan: IndexPlan, index: CandidateIndex, vectors_MD: Float64) -> None:
    try:
        index.add(vectors_MD.astype(np.float32))
    except ValueError as error:
        raise InputError(
            f"index.factory={plan.factory!r}: {engine.NAME} cannot add rows to it block by block ({error}); use"
            " another index.factory"
        ) from None


def open_shard(plan: IndexPlan, fitted: Fitted, shard: ShardRecord) -> IndexShard:
    """Open a shard to tune its search."""
    _, offset_D = read_map(plan.workspace, fitted.map)
    return IndexShard.open(plan.workspace, shard, offset_D)


def finish(
    plan: IndexPlan,
    fitted: Fitted,
    shards: Sequence[ShardRecord],
    tuned: tuple[str, IndexQuality],
    started: float,
) -> IndexManifest:
    """Write the manifest of complete shards, and remove the files of lost attempts.

    `tuned` is the result of `index.tuning`, `started` the `time.time()` at which the run started.
    """
    rows, (search, quality) = sum(shard.rows for shard in shards), tuned
    if quality.recall_top_k < plan.config.target_recall:
        logger.warning(
            "index.factory=%r: finds at best %.4f of the exact top %d, less than index.target_recall=%s; use a larger"
            " or less compressed index",
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
    _remove_strays(plan, fitted, shards)
    return commit(manifest, plan.workspace, plan.manifest)


def commit(record: R, workspace: Workspace, path: str) -> R:
    """Write a record, or return the one that another attempt wrote first."""
    try:
        record.write(workspace, path)
    except FileExistsError:
        return type(record).read(workspace, path)
    return record


def _remove_strays(plan: IndexPlan, fitted: Fitted, shards: Sequence[ShardRecord]) -> None:
    """Remove the files of attempts that were killed or came second."""
    files = [fitted.map, fitted.means, fitted.trained, *(file for shard in shards for file in shard.files.values())]
    keep = {file.path for file in files}
    for path in plan.workspace.files(plan.folder):
        if path not in keep and not path.endswith(".json"):
            plan.workspace.delete(path)

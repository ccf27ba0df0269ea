"""The index stage without Ray: the steps from a snapshot of a memory to an index.

1. `index_sums`, per shard: item sums and second moments of its rows. Those of an older snapshot are added to.
2. `fit`, once: the map of the space, and an empty index, trained on a sample of all shards if it needs training. Or
   those of an older index, with its segments (`stages.index_growth`).
3. `build_shard`, per shard: mapped rows and the index of the rows for what is new, and the item means that changed.
4. `index.tuning` over all shards (`open_shard`), if the base is new: the search setting that reaches the target recall.
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
from l2d_ray.core.moments import ItemSums, Moments
from l2d_ray.core.space import LinearMap, fit_map, fit_means
from l2d_ray.errors import InputError
from l2d_ray.index.engine import CandidateIndex, engine
from l2d_ray.index.files import read_bytes, read_map, read_means, write_array, write_bytes, write_map, write_means
from l2d_ray.index.manifest import Fitted, IndexFile, IndexManifest, IndexQuality, SegmentRecord, ShardRecord
from l2d_ray.index.moments import ShardMoments, write_moments
from l2d_ray.index.shard import IndexShard
from l2d_ray.records import Record
from l2d_ray.schema import hidden_states
from l2d_ray.stages.index_growth import grow, kept_centroids, kept_segments
from l2d_ray.stages.index_plan import IndexPlan
from l2d_ray.workspace import Workspace

logger = logging.getLogger(__name__)
R = TypeVar("R", bound=Record)


def fit(plan: IndexPlan) -> Fitted:
    """Decide what the shards share; skip what is done.

    That is the map and the segments of an older index, or else a map fitted to the moments of all shards, and an empty
    index that was trained.
    """
    workspace, record_path = plan.workspace, f"{plan.folder}/fitted.json"
    if workspace.exists(record_path):
        return Fitted.read(workspace, record_path)
    parts = (ShardMoments.read(workspace, plan.moments(shard)).moments for shard in range(plan.num_shards))
    moments = sum(parts, Moments.zero(plan.dimension))
    if moments.rows == 0:
        raise InputError(f"index.sample_fraction={plan.config.sample_fraction}: leaves no rows; raise it")
    try:
        fitted = grow(plan, moments) or _fit_anew(plan, moments)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"index.space={plan.config.space!r}: {error}; use index.space=none") from None
    return commit(fitted, workspace, record_path)


def _fit_anew(plan: IndexPlan, moments: Moments) -> Fitted:
    """Fit the map of the space to the moments, and train an empty index. Raises ValueError as `fit_map` does."""
    workspace, attempt = plan.workspace, uuid.uuid4().hex[:8]
    space = fit_map(moments, plan.config.space, plan.config.shrinkage)
    mean_D = moments.sum_D / moments.rows
    offset_D = mean_D if space.mean_D is None else np.zeros_like(mean_D)
    means, trained = fit_means(moments, plan.config.space, space), _train(plan, space, offset_D, moments.rows)
    return Fitted(
        map=write_map(workspace, f"{plan.folder}/space-{attempt}.npz", space, offset_D),
        means=write_means(workspace, f"{plan.folder}/means-{attempt}.npz", means),
        trained=write_bytes(workspace, f"{plan.folder}/trained-{attempt}.faiss", [trained.to_bytes()]),
        moments=write_moments(workspace, f"{plan.folder}/moments-{attempt}.npz", moments),
        segments=[plan.units],
    )


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
    """Map and index the new rows of a shard, and estimate its items; skip a shard that is done."""
    workspace, record_path = plan.workspace, plan.shard_record(shard)
    if workspace.exists(record_path):
        return ShardRecord.read(workspace, record_path)
    started, folder = time.monotonic(), f"{plan.folder}/shard={shard}/{uuid.uuid4().hex[:8]}"
    sums = ShardMoments.read(workspace, plan.moments(shard))
    items = sums.item_sums(plan.newest_day)
    segments = list(kept_segments(plan, fitted, shard))
    new_rows = sums.moments.rows - sum(segment.rows for segment in segments)
    for units in fitted.segments[len(segments) :]:  # at most one
        segments.append(_build_segment(plan, fitted, shard, units, new_rows, folder))
    arrays: dict[str, NDArray[Any]] = {"items": items.items_I, "counts": items.counts_I}
    arrays["centroids"] = _estimate_items(plan, fitted, shard, items)
    record = ShardRecord(
        shard=shard,
        rows=sums.moments.rows,
        items=items.items_I.size,
        files={
            name: write_array(workspace, f"{folder}/{name}.npy", array.shape, array.dtype, [array])
            for name, array in arrays.items()
        },
        segments=segments,
        seconds=round(time.monotonic() - started, 3),
    )
    return commit(record, workspace, record_path)


def _estimate_items(plan: IndexPlan, fitted: Fitted, shard: int, sums: ItemSums) -> NDArray[np.float32]:
    """Return the estimate of each item; those of items whose rows have not changed are those of the older index."""
    centroids_ID, known_I = kept_centroids(plan, fitted, shard, sums)
    space, _ = read_map(plan.workspace, fitted.map)
    counts_I = sums.counts_I[~known_I]
    means_ID = space(sums.sums_ID[~known_I] / counts_I[:, None])
    centroids_ID[~known_I] = read_means(plan.workspace, fitted.means)(means_ID, counts_I)
    return centroids_ID


def _build_segment(
    plan: IndexPlan, fitted: Fitted, shard: int, units: Sequence[str], count: int, folder: str
) -> SegmentRecord:
    """Write the mapped rows of some units, `count` rows, with their items, their sample ids and their index.

    The index of the base is of index.factory. A later segment is searched exactly while that is quick.
    """
    space, offset_D = read_map(plan.workspace, fitted.map)
    index = engine.create(engine.default_factory(count, plan.dimension), plan.dimension)
    if not fitted.kept or not index.exhaustive:
        index = engine.from_bytes(read_bytes(plan.workspace, fitted.trained))
    row_items: list[NDArray[np.int32]] = []
    sample_ids: list[NDArray[np.int64]] = []

    def mapped_rows() -> Iterator[NDArray[np.float16]]:
        for rows in plan.rows(shard, units=set(units)):
            row_items.append(np.array(rows.column("item_index")))
            sample_ids.append(np.array(rows.column("sample_id")))
            mapped_MD = map_rows(plan, space, hidden_states(rows))
            _add(plan, index, mapped_MD - offset_D)
            yield mapped_MD

    def write(name: str, shape: tuple[int, ...], dtype: DTypeLike, parts: Iterable[NDArray[Any]]) -> IndexFile:
        return write_array(plan.workspace, f"{folder}/{name}.npy", shape, dtype, parts)

    files = {
        "rows": write("rows", (count, plan.dimension), np.float16, mapped_rows()),  # fills the lists of the next two
        "row_items": write("row_items", (count,), np.int32, row_items),
        "sample_ids": write("sample_ids", (count,), np.int64, sample_ids),
        "faiss": write_bytes(plan.workspace, f"{folder}/rows.faiss", [index.to_bytes()]),
    }
    return SegmentRecord(rows=count, files=files, faiss_version=engine.VERSION)


def map_rows(plan: IndexPlan, space: LinearMap, states_MD: NDArray[np.float16]) -> NDArray[np.float16]:
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
        fitted=fitted,
        rows=rows,
        items=sum(shard.items for shard in shards),
        bytes_per_row=round(sum(file.bytes for shard in shards for file in shard.all_files()) / rows, 1),
        quality=quality,
        shards=list(shards),
        seconds=round(time.time() - started, 3),
    )
    _remove_strays(plan, manifest)
    return commit(manifest, plan.workspace, plan.manifest)


def commit(record: R, workspace: Workspace, path: str) -> R:
    """Write a record, or return the one that another attempt wrote first."""
    try:
        record.write(workspace, path)
    except FileExistsError:
        return type(record).read(workspace, path)
    return record


def _remove_strays(plan: IndexPlan, manifest: IndexManifest) -> None:
    """Remove the files of attempts that were killed or came second."""
    keep = {file.path for file in manifest.all_files()}
    for path in plan.workspace.files(plan.folder):
        if path not in keep and not path.endswith(".json"):
            plan.workspace.delete(path)

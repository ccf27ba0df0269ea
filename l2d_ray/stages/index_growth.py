"""The map and the segments that an index takes from that of an older snapshot.

A shard is a base segment and smaller ones of the rows that came later. A segment is valid in each snapshot that has
its units, so only new units are mapped and indexed. They become one segment, together with older segments of less than
twice their rows. So the sizes double from segment to segment, and each row is indexed again a few times only (Bentley
and Saxe, Journal of Algorithms, 1980).

The segments become one, built from the rows with the same map, if they reach the base or exceed index.max_segments, or
if rows of the base have changed. The map is fitted again, for a whole new index, if the memory moved by more than
index.max_drift (`core.space.drift`).
"""

import logging
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.moments import ItemSums, Moments
from l2d_ray.core.space import drift
from l2d_ray.errors import InputError
from l2d_ray.index.files import read_array, read_map
from l2d_ray.index.manifest import Fitted, IndexManifest, IndexQuality, SegmentRecord
from l2d_ray.index.moments import ShardMoments, read_moments
from l2d_ray.stages.index_plan import IndexPlan

logger = logging.getLogger(__name__)


def grow(plan: IndexPlan, moments: Moments) -> Fitted | None:
    """Return what the index shares with that of an older snapshot; None if the map is to be fitted anew.

    `moments` are those of the snapshot. Raises ValueError if they have no covariance (`core.space.fit_map`).
    """
    path = next((older.manifest for older in plan.older() if plan.workspace.exists(older.manifest)), None)
    older = _read(plan, path) if path else None
    if older is None:
        return None
    space, _ = read_map(plan.workspace, older.fitted.map)
    moved = drift(moments, read_moments(plan.workspace, older.fitted.moments), plan.config.space, space)
    if moved > plan.config.max_drift:
        logger.warning(
            "%s: the memory moved by %.3f, more than index.max_drift=%s; fitting its map again",
            plan.folder,
            moved,
            plan.config.max_drift,
        )
        return None
    kept, new_rows = _kept(plan, older, moments.rows)
    segments = older.fitted.segments[:kept]
    held = {unit for segment in segments for unit in segment}
    if new_rows:
        segments = [*segments, [unit for unit in plan.units if unit not in held]]
    return older.fitted.model_copy(update={"segments": segments, "kept": kept, "older": path})


def _read(plan: IndexPlan, path: str) -> IndexManifest | None:
    """Return an older index, or None if it is damaged or of another version of l2d_ray."""
    try:
        return IndexManifest.read(plan.workspace, path)
    except InputError as error:
        logger.warning("%s. Building the index anew", error)
        return None


def _kept(plan: IndexPlan, older: IndexManifest, rows: int) -> tuple[int, int]:
    """Return the number of segments to keep, from the base, and the number of the snapshot's other rows."""
    units, sizes = set(plan.units), segment_sizes(older)
    kept = 0
    while kept < len(sizes) and units.issuperset(older.fitted.segments[kept]):
        kept += 1
    while kept and sizes[kept - 1] < 2 * (rows - sum(sizes[:kept])):
        kept -= 1
    if kept + (rows > sum(sizes[:kept])) > plan.config.max_segments:
        kept = 0
    return kept, rows - sum(sizes[:kept])


def segment_sizes(manifest: IndexManifest) -> list[int]:
    """Return the rows of each segment over all shards."""
    of_shards = [[segment.rows for segment in shard.segments] for shard in manifest.shards]
    return [sum(rows) for rows in zip(*of_shards, strict=True)]


def kept_segments(plan: IndexPlan, fitted: Fitted, shard: int) -> Sequence[SegmentRecord]:
    """Return the segments of a shard that are those of the older index."""
    if not fitted.older or not fitted.kept:
        return []
    return IndexManifest.read(plan.workspace, fitted.older).shards[shard].segments[: fitted.kept]


def kept_centroids(
    plan: IndexPlan, fitted: Fitted, shard: int, sums: ItemSums
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return an estimate for each item of a shard, and whether it is that of the older index. Others are arbitrary.

    With a half-life none is, because every row has aged.
    """
    centroids_ID, known_I = np.empty(sums.sums_ID.shape, np.float32), np.zeros(sums.items_I.size, np.bool_)
    workspace, older = plan.workspace, fitted.older
    path = older and plan.moments_below(str(PurePosixPath(older).parents[1]), shard)
    if plan.config.half_life_days or not older or not path or not workspace.exists(path):
        return centroids_ID, known_I
    old, record = ShardMoments.read(workspace, path), IndexManifest.read(workspace, older).shards[shard]
    _, here, there = np.intersect1d(sums.items_I, old.items_I, assume_unique=True, return_indices=True)
    same = (sums.sums_ID[here] == old.sums_ID[there]).all(axis=1) & (sums.counts_I[here] == old.counts_I[there])
    old_ID = read_array(workspace, record.files["centroids"], (record.items, plan.dimension))
    centroids_ID[here[same]], known_I[here[same]] = old_ID[there[same]], True
    return centroids_ID, known_I


def kept_setting(plan: IndexPlan, fitted: Fitted) -> tuple[str, IndexQuality] | None:
    """Return the search setting of the older index and its quality if its base is kept, to which both belong."""
    if not fitted.older or not fitted.kept:
        return None
    older = IndexManifest.read(plan.workspace, fitted.older)
    return (older.search, older.quality) if older.target_recall == plan.config.target_recall else None

"""The part of the index stage that makes the aggregation `posterior` possible, without Ray.

1. `count_transitions`, per shard: what followed what in the training samples, for the targets of the shard.
2. `encode`: the states of the validation samples.
3. `fit_posterior`, once: the parameters, from the validation samples.

The counts belong to the snapshot, the parameters to one index of it. What is there is not computed again.
"""

import time
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from l2d_ray.config import Config
from l2d_ray.core.arrays import Float64, FloatArray
from l2d_ray.core.calibration import ValidationScores
from l2d_ray.core.transitions import TransitionCounts, last_items
from l2d_ray.data.dataset import Dataset
from l2d_ray.data.samples import Sample, choose_samples, training_parts
from l2d_ray.index.files import read_array, read_map
from l2d_ray.index.manifest import IndexManifest, PosteriorRecord, TransitionsRecord
from l2d_ray.index.posterior import centred, read_counts, shard_items, write_counts
from l2d_ray.schema import Split
from l2d_ray.stages.index_plan import IndexPlan, dataset_of
from l2d_ray.stages.indexing import commit
from l2d_ray.workspace import Workspace

MIN_SAMPLES, MAX_SAMPLES = 200, 2000
MAX_SCORES = 15_000_000
"""Samples times items that are fitted on, unless that leaves fewer than `MIN_SAMPLES`."""
BATCH = 256
"""Histories that are encoded together."""


def count_transitions(plan: IndexPlan, shard: int) -> TransitionsRecord:
    """Count the transitions to the items of a shard; skip a shard that is done.

    Raises InputError if the workspace has another dataset than that of the memory.
    """
    workspace, record_path = plan.workspace, plan.transitions(shard)
    if workspace.exists(record_path):
        return TransitionsRecord.read(workspace, record_path)
    started, dataset = time.monotonic(), dataset_of(plan)
    num_items = dataset.items().num_rows
    targets_V = shard_items(num_items, plan.num_shards, shard)
    counts = TransitionCounts.count(training_parts(dataset), num_items, targets_V)
    # The content is the same in every attempt, so they may share a name.
    file = write_counts(workspace, str(PurePosixPath(record_path).with_suffix(".npz")), counts)
    seconds = round(time.monotonic() - started, 3)
    record = TransitionsRecord(shard=shard, pairs=counts.places_P.size, file=file, seconds=seconds)
    return commit(record, workspace, record_path)


def validation_samples(dataset: Dataset) -> list[Sample]:
    """Return the validation samples to fit on, fewer for a larger catalogue."""
    limit = MAX_SCORES // dataset.items().num_rows
    return choose_samples(dataset, Split.VALID, min(max(limit, MIN_SAMPLES), MAX_SAMPLES))


def encode(config: Config, histories: Sequence[NDArray[np.int32]]) -> FloatArray:
    """Return the hidden states [U, D] of histories."""
    from l2d_ray.encoding import HistoryEncoder  # here, because importing PyTorch takes seconds

    titles: list[str] = Dataset.open(Workspace.open(config.workspace)).items()["title"].to_pylist()
    encoder = HistoryEncoder(config, titles)
    starts = range(0, len(histories), BATCH)
    return np.concatenate([encoder.encode(histories[start : start + BATCH]).states_UD for start in starts])


def fit_posterior(
    plan: IndexPlan, transitions: Sequence[TransitionsRecord], samples: Sequence[Sample], states_UD: FloatArray
) -> PosteriorRecord:
    """Fit the parameters to validation samples, given their states; without samples, record the defaults.

    The index must be complete. Skips a fit that is done.
    """
    workspace, started = plan.workspace, time.monotonic()
    if workspace.exists(plan.posterior):
        return PosteriorRecord.read(workspace, plan.posterior)
    histories = [sample.history for sample in samples]
    counts = [read_counts(workspace, record.file) for record in transitions]
    joined = TransitionCounts.join(counts, np.maximum(last_items(histories), 0))
    scores = ValidationScores(
        state_scores_UV=_state_scores(plan, states_UD, joined.num_items),
        histories=histories,
        targets_U=np.array([sample.target for sample in samples], np.int64),
        counts=joined,
    )
    parameters = scores.fit()
    record = PosteriorRecord(
        parameters=parameters,
        samples=len(samples),
        nats=round(scores.cross_entropy(parameters), 4) if samples else None,
        items=joined.num_items,
        transitions=list(transitions),
        seconds=round(time.monotonic() - started, 3),
    )
    return commit(record, workspace, plan.posterior)


def _state_scores(plan: IndexPlan, states_UD: FloatArray, num_items: int) -> NDArray[np.float32]:
    """Return m_v . h - |m_v|^2 / 2 [U, items] of the whole catalogue; 0 for items without rows."""
    workspace, manifest = plan.workspace, IndexManifest.read(plan.workspace, plan.manifest)
    space, offset_D = read_map(workspace, manifest.map)
    queries_UD: Float64 = space(states_UD) - offset_D
    scores_UV = np.zeros((len(states_UD), num_items), np.float32)
    for shard in manifest.shards:
        items_I = read_array(workspace, shard.files["items"], (shard.items,))
        means = read_array(workspace, shard.files["centroids"], (shard.items, plan.dimension))
        means_ID = centred(means, offset_D)
        scores_UV[:, items_I] = queries_UD.astype(np.float32) @ means_ID.T - np.vecdot(means_ID, means_ID) / 2
    return scores_UV

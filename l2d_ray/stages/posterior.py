"""The part of the index stage that makes the aggregation `posterior` possible, without Ray.

1. `count_transitions`, per shard: what followed what in the training samples, for the targets of the shard.
2. `encode`: the states of the validation samples.
3. `fit_posterior`, once: the parameters, from the validation samples.

The counts belong to the snapshot, the parameters to one index of it, or to all with the same map. What is there is not
computed again, and counts are added to those of an older snapshot.
"""

import time
from collections.abc import Sequence
from itertools import chain
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from l2d_ray.config import Config
from l2d_ray.core.arrays import Float64, FloatArray
from l2d_ray.core.calibration import ValidationScores
from l2d_ray.core.transitions import TransitionCounts, last_items
from l2d_ray.data.dataset import Dataset
from l2d_ray.data.generations import Generation
from l2d_ray.data.samples import Sample, choose_samples, training_parts
from l2d_ray.data.versions import GenerationRecord
from l2d_ray.errors import InputError
from l2d_ray.index.files import read_array, read_map
from l2d_ray.index.manifest import IndexManifest, PosteriorRecord, TransitionsRecord, posterior_path
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
    older, generations = _counted_before(plan, shard, dataset)
    parts = chain.from_iterable(map(training_parts, generations))
    counts = TransitionCounts.count(parts, num_items, targets_V)
    if older:
        counts = counts.plus(read_counts(workspace, older.file))
    # The content is the same in every attempt, so they may share a name.
    file = write_counts(workspace, str(PurePosixPath(record_path).with_suffix(".npz")), counts)
    seconds = round(time.monotonic() - started, 3)
    record = TransitionsRecord(shard=shard, pairs=counts.places_P.size, file=file, seconds=seconds)
    return commit(record, workspace, record_path)


def _counted_before(
    plan: IndexPlan, shard: int, dataset: Dataset
) -> tuple[TransitionsRecord | None, Sequence[Generation]]:
    """Return the counts of an older snapshot, if they are there, and the generations that they lack."""
    for older in plan.older():
        if plan.workspace.exists(older.transitions(shard)):
            known = _generations_of(plan.workspace, older.snapshot.dataset)
            if known and dataset.version.generations[: len(known)] == known:
                record = TransitionsRecord.read(plan.workspace, older.transitions(shard))
                return record, dataset.generations[len(known) :]
    return None, dataset.generations


def _generations_of(workspace: Workspace, digest: str) -> list[GenerationRecord]:
    """Return the generations of a version of the dataset; none if it is not there any more."""
    try:
        return Dataset.open(workspace, digest).version.generations
    except InputError:
        return []


def keep_parameters(plan: IndexPlan, transitions: Sequence[TransitionsRecord]) -> PosteriorRecord | None:
    """Record the parameters of the older index whose map this one has; None if there are none."""
    workspace, manifest = plan.workspace, IndexManifest.read(plan.workspace, plan.manifest)
    older = manifest.fitted.older and posterior_path(manifest.fitted.older)
    if not older or not workspace.exists(older):
        return None
    changes = {"transitions": list(transitions), "items": dataset_of(plan).items().num_rows, "seconds": 0.0}
    return commit(PosteriorRecord.read(workspace, older).model_copy(update=changes), workspace, plan.posterior)


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
    space, offset_D = read_map(workspace, manifest.fitted.map)
    queries_UD: Float64 = space(states_UD) - offset_D
    scores_UV = np.zeros((len(states_UD), num_items), np.float32)
    for shard in manifest.shards:
        items_I = read_array(workspace, shard.files["items"], (shard.items,))
        means = read_array(workspace, shard.files["centroids"], (shard.items, plan.dimension))
        means_ID = centred(means, offset_D)
        scores_UV[:, items_I] = queries_UD.astype(np.float32) @ means_ID.T - np.vecdot(means_ID, means_ID) / 2
    return scores_UV

"""The part of the index stage that makes the aggregation `posterior` possible, without Ray.

1. `count_transitions`, per shard: what followed what in the training samples, for the targets of the shard.
2. `compute_titles`, once: the states of the titles that the workspace does not have yet.
3. `encode`: the states of the validation samples.
4. `fit_posterior`, once: the means that titles predict, the parameters from the validation samples, the item means.

The counts belong to the snapshot, the parameters to one index of it, or to all with the same map. What is there is not
computed again, and counts are added to those of an older snapshot.

The fit weighs titles, and items without training samples, by how often such items are targets of validation samples. A
split by time has them. Leave-one-out has few, so there the fit expects few. Without validation samples the parameters
are the defaults, with which an item without training samples counts as one with five.
"""

import time
from collections.abc import Sequence
from itertools import chain
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from l2d_ray.config import Config
from l2d_ray.core.arrays import FloatArray
from l2d_ray.core.calibration import ValidationScores
from l2d_ray.core.transition_counts import TransitionCounts
from l2d_ray.core.transitions import last_items
from l2d_ray.data.dataset import Dataset
from l2d_ray.data.generations import Generation
from l2d_ray.data.samples import Sample, choose_samples, training_parts
from l2d_ray.data.versions import GenerationRecord
from l2d_ray.errors import InputError
from l2d_ray.index.manifest import IndexManifest, PosteriorRecord, TransitionsRecord, posterior_path
from l2d_ray.index.posterior import read_counts, shard_items, write_counts
from l2d_ray.schema import Split
from l2d_ray.stages.index_plan import IndexPlan, dataset_of, plan_index
from l2d_ray.stages.indexing import commit
from l2d_ray.stages.item_means import IndexMeans
from l2d_ray.stages.settings import INDEX, for_queries
from l2d_ray.workspace import Workspace

MIN_SAMPLES, MAX_SAMPLES = 200, 2000
MAX_SCORES = 15_000_000
"""Samples times items that are fitted on, unless that leaves fewer than `MIN_SAMPLES`."""
BATCH = 64
"""Histories that are encoded together. There are no more tasks than such batches, because each task loads the model."""


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
    counts = TransitionCounts.count(parts, num_items, targets_V, plan.config.half_life_days)
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


def kept_parameters(plan: IndexPlan) -> PosteriorRecord | None:
    """Return what was fitted to the older index whose map this one has, or else in `index.parameters_from`.

    None if there is neither. Raises InputError if that workspace has no fitted index.
    """
    older = IndexManifest.read(plan.workspace, plan.manifest).fitted.older
    path, other = older and posterior_path(older), plan.config.parameters_from
    record = PosteriorRecord.read(plan.workspace, path) if path and plan.workspace.exists(path) else None
    return _fitted_in(other) if other and not (record and record.samples) else record


def _fitted_in(location: str) -> PosteriorRecord:
    """Return what was fitted to the index of another workspace that was built last."""
    workspace = Workspace.open(location)
    path = plan_index(for_queries(Config(workspace=location))).posterior if workspace.exists(INDEX) else None
    if path is None or not workspace.exists(path):
        raise InputError(
            f"index.parameters_from={location!r}: no index with fitted parameters there; run jobs/build_index.py with"
            f" workspace={location} first"
        )
    return PosteriorRecord.read(workspace, path)


def validation_samples(dataset: Dataset) -> list[Sample]:
    """Return the validation samples to fit on, fewer for a larger catalogue."""
    limit = MAX_SCORES // dataset.items().num_rows
    return choose_samples(dataset, Split.VALID, min(max(limit, MIN_SAMPLES), MAX_SAMPLES))


def compute_titles(config: Config, plan: IndexPlan) -> FloatArray:
    """Return the state of each title of the snapshot's catalogue [I, D]; run those that the workspace lacks.

    Raises InputError as `title_states` does.
    """
    from l2d_ray.recommenders.title_states import title_states  # here, because importing PyTorch takes seconds

    return title_states(config, dataset_of(plan))


def encode(config: Config, histories: Sequence[NDArray[np.int32]]) -> FloatArray:
    """Return the hidden states [U, D] of histories."""
    from l2d_ray.encoding import HistoryEncoder  # here, because importing PyTorch takes seconds

    titles: list[str] = Dataset.open(Workspace.open(config.workspace)).items()["title"].to_pylist()
    encoder = HistoryEncoder(config, titles)
    starts = range(0, len(histories), BATCH)
    return np.concatenate([encoder.encode(histories[start : start + BATCH]).states_UD for start in starts])


def fit_posterior(
    config: Config,
    plan: IndexPlan,
    transitions: Sequence[TransitionsRecord],
    samples: Sequence[Sample],
    states_UD: FloatArray,
) -> PosteriorRecord:
    """Fit the parameters to validation samples, given their states; without samples, record the defaults.

    Samples with a state that is not finite are left out. Parameters that are kept (`kept_parameters`) need no samples.
    The index must be complete. Skips a fit that is done.
    """
    finite_F = np.flatnonzero(np.isfinite(states_UD).all(axis=1)).tolist()
    samples, states_UD = [samples[number] for number in finite_F], states_UD[finite_F]
    workspace, started, kept = plan.workspace, time.monotonic(), kept_parameters(plan)
    if workspace.exists(plan.posterior):
        return PosteriorRecord.read(workspace, plan.posterior)
    means = IndexMeans.open(plan, compute_titles(config, plan))
    if kept:
        parameters, used, nats = kept.parameters, kept.samples, kept.nats
    else:
        scores = _scores(plan, means, transitions, samples, states_UD)
        parameters, used = scores.fit(), len(samples)
        nats = round(scores.cross_entropy(parameters), 4) if samples else None
    record = PosteriorRecord(
        parameters=parameters,
        samples=used,
        nats=nats,
        items=len(means.titles_ID),
        transitions=list(transitions),
        means=means.write(plan, parameters.title),
        seconds=round(time.monotonic() - started, 3),
    )
    return commit(record, workspace, plan.posterior)


def _scores(
    plan: IndexPlan,
    means: IndexMeans,
    transitions: Sequence[TransitionsRecord],
    samples: Sequence[Sample],
    states_UD: FloatArray,
) -> ValidationScores:
    """Return the validation samples with the scores of the whole catalogue."""
    histories = [sample.history for sample in samples]
    counts = [read_counts(plan.workspace, record.file) for record in transitions]
    joined = TransitionCounts.join(counts, np.maximum(last_items(histories), 0))
    queries_UD = (means.space(states_UD) - means.offset_D).astype(np.float32)
    of_states_UV, of_titles_UV = np.zeros((2, len(samples), joined.num_items), np.float32)
    norms_V = np.zeros(joined.num_items, np.float32)
    for number in range(plan.num_shards if samples else 0):
        items_V, *estimates = means.shard(number)
        rows_VD, titles_VD = (estimate_VD.astype(np.float32) for estimate_VD in estimates)
        of_states_UV[:, items_V] = queries_UD @ rows_VD.T - np.vecdot(rows_VD, rows_VD) / 2
        of_titles_UV[:, items_V] = queries_UD @ titles_VD.T - np.vecdot(rows_VD, titles_VD)
        norms_V[items_V] = np.vecdot(titles_VD, titles_VD) / 2
    return ValidationScores(
        state_scores_UV=of_states_UV,
        title_scores_UV=of_titles_UV,
        title_norms_V=norms_V,
        histories=histories,
        targets_U=np.array([sample.target for sample in samples], np.int64),
        counts=joined,
    )

"""The last part of the index stage on Ray: the parameters of the aggregation `posterior`.

1. Count the transitions to the items of every shard.
2. Run the titles through the model of the memory.
3. Keep the parameters of an older index with the same map, or of another workspace (`index.parameters_from`), or run
   the validation samples through the model, too.
4. Fit the parameters, unless they are kept, and estimate the items.

The index must be complete. Every step leaves files, and the same command continues from them.
"""

import logging
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from l2d_ray.config import Config
from l2d_ray.core.arrays import FloatArray
from l2d_ray.data.samples import Sample
from l2d_ray.distributed.tasks import run_tasks
from l2d_ray.distributed.workers import check_room, workers_that_fit
from l2d_ray.encoding import identify_memory
from l2d_ray.index.manifest import PosteriorRecord
from l2d_ray.records import check_query
from l2d_ray.stages.index_plan import IndexPlan, dataset_of, plan_index
from l2d_ray.stages.posterior import (
    BATCH,
    compute_titles,
    count_transitions,
    encode,
    fit_posterior,
    kept_parameters,
    validation_samples,
)

logger = logging.getLogger(__name__)


def ensure_posterior(config: Config) -> PosteriorRecord:
    """Fit or keep the parameters for the index that `config.index` describes, unless that was done.

    Raises InputError if the workspace has another dataset than that of the memory, or if `config` names another model.
    """
    plan = plan_index(config)
    has_defaults = plan.workspace.exists(plan.posterior)
    if has_defaults:
        known = PosteriorRecord.read(plan.workspace, plan.posterior)
        if known.samples or not plan.config.parameters_from:
            return known
    kept = kept_parameters(plan)
    check_room(config)
    dataset = dataset_of(plan)
    check_query(plan.snapshot.identity, identify_memory(config))
    shards = [(plan, shard) for shard in range(plan.num_shards)]
    transitions = run_tasks("transitions", config, count_transitions, shards)
    run_tasks("titles", config, _compute_titles, [(config, plan)], gpus=config.workers.gpus)
    samples = [] if kept else validation_samples(dataset)
    states_UD = _encode(config, plan, samples)
    if has_defaults:  # index.parameters_from replaces them
        plan.workspace.remove([plan.posterior])
    record: PosteriorRecord
    (record,) = run_tasks("parameters", config, fit_posterior, [(config, plan, transitions, samples, states_UD)])
    if not record.samples:
        logger.warning(
            "%s: no validation samples; `l2d` (aggregation=posterior) has the default parameters. To take those that"
            " were fitted in another workspace, add index.parameters_from=WORKSPACE",
            plan.workspace.path("dataset"),
        )
    return record


def _compute_titles(config: Config, plan: IndexPlan) -> None:
    """Write the states of titles to the workspace, from where `fit_posterior` reads them."""
    compute_titles(config, plan)


def _encode(config: Config, plan: IndexPlan, samples: Sequence[Sample]) -> FloatArray:
    """Return the hidden states [U, D] of samples, from tasks that load the model."""
    tasks = min(workers_that_fit(config), -(-len(samples) // BATCH))
    bounds = np.linspace(0, len(samples), tasks + 1).astype(int).tolist() if tasks else []
    parts = [samples[start:stop] for start, stop in pairwise(bounds)]
    calls = [(config, [sample.history for sample in part]) for part in parts]
    nothing = np.empty((0, plan.dimension), np.float32)
    return np.concatenate([nothing, *run_tasks("validation states", config, encode, calls, gpus=config.workers.gpus)])

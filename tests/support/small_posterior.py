"""The fit of the parameters of the aggregation `posterior`, without Ray."""

import numpy as np

from l2d_ray.config import Config
from l2d_ray.index.manifest import PosteriorRecord
from l2d_ray.stages.index_plan import dataset_of, plan_index
from l2d_ray.stages.posterior import count_transitions, encode, fit_posterior, kept_parameters, validation_samples


def fit(config: Config) -> PosteriorRecord:
    """Fit the parameters for the index of a workspace, or keep those of an older one."""
    plan = plan_index(config)
    samples = [] if kept_parameters(plan) else validation_samples(dataset_of(plan))
    transitions = [count_transitions(plan, shard) for shard in range(plan.num_shards)]
    histories = [sample.history for sample in samples]
    states_UD = encode(config, histories) if samples else np.empty((0, plan.dimension), np.float32)
    return fit_posterior(config, plan, transitions, samples, states_UD)

"""The fit of the weights of fusions on validation samples, without Ray.

The name of the record has a digest of all that decides the weights. So a fusion is fitted once for its parts as they
are, and again after one of them has changed.
"""

import time
from collections.abc import Mapping, Sequence

import numpy as np

from l2d_ray.config import Config
from l2d_ray.core.fusion import FusionSamples
from l2d_ray.core.query import Query
from l2d_ray.data.samples import Sample
from l2d_ray.recommenders.contract import DENSE_BATCH, IndexKey
from l2d_ray.recommenders.fused import FusionRecord, parts_of, record_path, seen_pairs
from l2d_ray.recommenders.registry import NamedRecommender
from l2d_ray.recommenders.resources import Resources
from l2d_ray.stages.indexing import commit
from l2d_ray.stages.posterior import validation_samples


def fit_fusion(config: Config, fusion: NamedRecommender, indexes: Mapping[IndexKey, str]) -> FusionRecord:
    """Fit the weights of a fusion; without validation samples, record equal ones. Skips a fit that is done.

    `indexes` has the path of each index's manifest. Raises InputError if a part is missing or damaged.
    """
    started = time.monotonic()
    resources = Resources(config, fusion.needs, indexes)
    dataset, workspace = resources.dataset, resources.dataset.workspace
    path = record_path(fusion.options, dataset, indexes)
    if workspace.exists(path):
        return FusionRecord.read(workspace, path)
    scores = _scores(fusion, resources, validation_samples(dataset))
    weights, samples = scores.fit(), scores.targets_U.size
    record = FusionRecord(
        parts={part.name: weight for part, weight in zip(fusion.options.parts, weights.parts_K, strict=True)},
        log_repeat=weights.log_repeat,
        samples=samples,
        nats=round(scores.cross_entropy(weights), 4) if samples else None,
        seconds=round(time.monotonic() - started, 3),
    )
    return commit(record, workspace, path)


def _scores(fusion: NamedRecommender, resources: Resources, samples: Sequence[Sample]) -> FusionSamples:
    """Return what the parts of a fusion say of samples."""
    parts, num_items = parts_of(fusion.options, resources), len(resources.titles)
    logs_KUI = np.zeros((len(parts), len(samples), num_items), np.float32)
    queries = [Query(sample.history, timestamp=sample.timestamp) for sample in samples]
    for start in range(0, len(samples), DENSE_BATCH):
        batch = slice(start, start + DENSE_BATCH)
        for logs_UI, part in zip(logs_KUI, parts, strict=True):
            logs_UI[batch], _ = part.run(queries[batch])
    seen = seen_pairs([sample.history for sample in samples], num_items)
    return FusionSamples(logs_KUI, seen, np.array([sample.target for sample in samples], np.int64))

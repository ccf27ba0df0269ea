"""The fit of the weights of fusions on validation samples, without Ray.

The name of the record has a digest of all that decides the weights. So a fusion is fitted once for its parts as they
are, and again after one of them has changed.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from l2d_ray.config import Config
from l2d_ray.core.fusion import FusionSamples
from l2d_ray.core.query import Query
from l2d_ray.data.samples import Sample
from l2d_ray.recommenders.contract import DENSE_BATCH, IndexKey
from l2d_ray.recommenders.fused import FusionRecord, Part, parts_of, record_path, seen_pairs
from l2d_ray.recommenders.registry import NamedRecommender
from l2d_ray.recommenders.resources import Resources
from l2d_ray.stages.indexing import commit
from l2d_ray.stages.posterior import validation_samples


def fit_fusions(
    config: Config, fusions: Sequence[NamedRecommender], indexes: Mapping[IndexKey, str]
) -> list[FusionRecord]:
    """Fit the weights of fusions; without validation samples, record equal ones. Skips a fit that is done.

    A part that several fusions have scores the samples once. `indexes` has the path of each index's manifest. Raises
    InputError if a part is missing or damaged.
    """
    resources = Resources(config, {need for fusion in fusions for need in fusion.needs}, indexes)
    scores = _Scores(resources, validation_samples(resources.dataset))
    return [_fit(fusion, scores) for fusion in fusions]


@dataclass(frozen=True)
class _Scores:
    """Scores of validation samples by the parts of fusions."""

    resources: Resources
    samples: Sequence[Sample]
    logs: dict[NamedRecommender, NDArray[np.float32]] = field(default_factory=dict)

    def of(self, fusion: NamedRecommender) -> FusionSamples:
        """Return the scores by the parts of one fusion. Each part runs when it is first needed."""
        parts, num_items = parts_of(fusion.options, self.resources), len(self.resources.titles)
        logs_KUI = np.zeros((len(parts), len(self.samples), num_items), np.float32)
        for logs_UI, part in zip(logs_KUI, parts, strict=True):
            if part.named not in self.logs:
                self.logs[part.named] = self._run(part)
            logs_UI[:] = self.logs[part.named]
        seen = seen_pairs([sample.history for sample in self.samples], num_items)
        return FusionSamples(logs_KUI, seen, np.array([sample.target for sample in self.samples], np.int64))

    def _run(self, part: Part) -> NDArray[np.float32]:
        queries = [Query(sample.history, timestamp=sample.timestamp) for sample in self.samples]
        batches = [queries[start : start + DENSE_BATCH] for start in range(0, len(queries), DENSE_BATCH)]
        return np.concatenate([np.empty((0, part.num_items), np.float32), *(part.run(batch)[0] for batch in batches)])


def _fit(fusion: NamedRecommender, scores: _Scores) -> FusionRecord:
    started, dataset = time.monotonic(), scores.resources.dataset
    path = record_path(fusion.options, dataset, scores.resources.indexes)
    if dataset.workspace.exists(path):
        return FusionRecord.read(dataset.workspace, path)
    found = scores.of(fusion)
    weights, samples = found.fit(), found.targets_U.size
    record = FusionRecord(
        parts={part.name: weight for part, weight in zip(fusion.options.parts, weights.parts_K, strict=True)},
        log_repeat=weights.log_repeat,
        samples=samples,
        nats=round(found.cross_entropy(weights), 4) if samples else None,
        seconds=round(time.monotonic() - started, 3),
    )
    return commit(record, dataset.workspace, path)

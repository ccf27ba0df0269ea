"""The running of recommenders on samples: the rank of each target in the list of each recommender, and the cost."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from l2d_ray.config import Config
from l2d_ray.core.metrics import target_ranks
from l2d_ray.core.query import Query
from l2d_ray.recommenders.contract import IndexKey, Outcome
from l2d_ray.recommenders.registry import NamedRecommender
from l2d_ray.recommenders.resources import Resources
from l2d_ray.stages.fresh import FreshResources
from l2d_ray.stages.summary import CUTOFFS, TOP

Columns = Mapping[str, NDArray[Any]]
"""Columns of a table, by name."""


class Evaluator:
    """Runs recommenders on batches of samples. Models and indexes are loaded once, when they are first needed."""

    def __init__(
        self, config: Config, runs: Mapping[str, Sequence[NamedRecommender]], indexes: Mapping[IndexKey, str]
    ) -> None:
        """Load nothing yet. `runs` has the recommenders of each run, by its label."""
        self._runs, self._exclude_seen = runs, config.recommend.exclude_seen
        self._appeared = config.evaluate.candidates == "appeared"
        needs = {need for named in runs.values() for one in named for need in one.needs}
        fitted = {key for named in runs.values() for one in named for key in one.options.fitted}
        self._fresh = FreshResources(config, needs, indexes, fitted) if config.evaluate.memory == "fresh" else None
        self._resources = self._fresh or Resources(config, needs, indexes)
        self._warm: set[str] = set()

    def ranks(self, samples: Columns) -> dict[str, NDArray[Any]]:
        """Return a row for each sample and each recommender of its run.

        `samples` has the columns `run`, `sample_id`, `user_hash`, `history`, `target` and `timestamp` (of the target).
        The rows have `run`, `number` (of the recommender in its run), `recommender`, `sample_id`, `user_hash`,
        `target`, `rank`, `top`, `log_probabilities`, `seconds` and `tokens`. `top` has the first 20 items, and the next
        column their scores if they are log-probabilities. The last two are means over the batch.
        """
        parts = [
            self._ranks_in_run(label, part)
            for label in np.unique(samples["run"]).tolist()
            for part in self._by_moment(_where(samples, samples["run"] == label))
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def recommend(self, named: Sequence[NamedRecommender], queries: Sequence[Query]) -> list[Outcome]:
        """Return what each recommender answers to the queries; those of one class may share work."""
        recommenders = [self._resources.recommender(one) for one in named]
        outcomes: dict[int, Outcome] = {}
        for kind in dict.fromkeys(type(one) for one in recommenders):
            numbers = [number for number, one in enumerate(recommenders) if type(one) is kind]
            outcomes |= zip(numbers, kind.run_all([recommenders[n] for n in numbers], queries), strict=True)
        return [outcomes[number] for number in range(len(named))]

    def _by_moment(self, samples: Columns) -> Iterator[Columns]:
        """Yield samples in parts that may be answered together, after the resources have moved to their moment."""
        if self._fresh is None:
            yield samples
            return
        moments = self._fresh.refreshes(samples["timestamp"])
        for moment in np.unique(moments).tolist():
            self._fresh.move_to(moment)
            yield _where(samples, moments == moment)

    def _ranks_in_run(self, label: str, samples: Columns) -> dict[str, NDArray[Any]]:
        named = self._runs[label]
        queries = self._queries(samples)
        if label not in self._warm:  # load models, build tries and fill caches before anything is timed
            self.recommend(named, queries[:1])
            self._warm.add(label)
        outcomes, size = self.recommend(named, queries), len(queries)
        targets = samples["target"].astype(np.int32)
        ranks = [target_ranks([items.items_I for items in outcome.lists], targets) for outcome in outcomes]
        return {
            "run": np.repeat(label, size * len(outcomes)),
            "number": np.repeat(np.arange(len(outcomes)), size),
            "recommender": np.repeat([one.name for one in named], size),
            "sample_id": np.tile(samples["sample_id"], len(outcomes)),
            "user_hash": np.tile(samples["user_hash"], len(outcomes)),
            "target": np.tile(targets, len(outcomes)),
            "rank": np.concatenate(ranks),
            "top": _as_column([items.items_I[:TOP] for outcome in outcomes for items in outcome.lists], np.int32),
            "log_probabilities": _as_column(
                [
                    items.scores_I[: TOP if one.options.log_probabilities else 0]
                    for one, outcome in zip(named, outcomes, strict=True)
                    for items in outcome.lists
                ],
                np.float32,
            ),
            "seconds": np.repeat([outcome.seconds / size for outcome in outcomes], size),
            "tokens": np.repeat([outcome.tokens / size for outcome in outcomes], size),
        }

    def _queries(self, samples: Columns) -> list[Query]:
        """Return the query of each sample, at the moment of its target, for the items that are candidates then."""
        columns = samples["history"], samples["timestamp"].tolist(), samples["sample_id"].tolist()
        return [
            Query.after(
                np.asarray(history, np.int32),
                max(CUTOFFS),
                self._exclude_seen,
                deny=np.flatnonzero(self._resources.first_times_I > time) if self._appeared else (),
                timestamp=time,
                sample_id=sample_id,
            )
            for history, time, sample_id in zip(*columns, strict=True)
        ]


def _where(samples: Columns, chosen: NDArray[np.bool_]) -> Columns:
    return {name: column[chosen] for name, column in samples.items()}


def _as_column(lists: Sequence[NDArray[Any]], dtype: DTypeLike) -> NDArray[Any]:
    """Return lists of numbers as an array of objects, which pyarrow reads as lists."""
    column = np.empty(len(lists), object)
    column[:] = [numbers.astype(dtype) for numbers in lists]
    return column

"""The items that most often followed the last item: a first-order Markov chain, the simplest model of a sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.decoding import NO_ITEMS, ScoredItems, best_items, completed
from l2d_ray.core.query import Query
from l2d_ray.recommenders.contract import Declaration, Need, Options, Recommender, logarithms
from l2d_ray.recommenders.most_popular import MostPopular


@dataclass(frozen=True)
class CoOccurrence(Recommender):
    """Scores are the share of the last item's training samples that an item followed. Popular items complete a list."""

    followers: dict[int | str, ScoredItems]
    """By the last item of a history. No training sample ends in an item that the catalogue does not know."""
    popular: ScoredItems

    @classmethod
    def fit(cls, last_items: NDArray[np.integer], targets: NDArray[np.integer]) -> "CoOccurrence":
        """Count pairs of the last item and the target of the training samples."""
        pairs, counts = np.unique(np.stack([last_items, targets], axis=1), axis=0, return_counts=True)
        lasts, starts, totals = np.unique(pairs[:, 0], return_index=True, return_counts=True)
        followers: dict[int | str, ScoredItems] = {}
        for last, start, total in zip(lasts.tolist(), starts, totals, strict=True):
            after = slice(start, start + total)
            shares = counts[after] / counts[after].sum()
            followers[last] = best_items([ScoredItems(pairs[after, 1].astype(np.int64), shares)], total)
        ranking = MostPopular.fit(targets).ranking
        return cls(followers, ScoredItems(ranking.items_I, ranking.scores_I / max(ranking.scores_I.sum(), 1)))

    def recommend(self, queries: Sequence[Query]) -> list[ScoredItems]:
        """Return the permitted items that followed the last item, then popular ones."""
        return [
            completed(
                self.followers.get(query.history[-1], NO_ITEMS), self.popular, query.k, query.exclude, query.allow
            )
            for query in queries
        ]


DECLARATION = Declaration(
    pattern="co-occurrence",
    form="co-occurrence",
    examples=("co-occurrence",),
    options=Options,
    make=lambda _, resources: CoOccurrence.fit(
        resources.training_interactions.lasts, resources.training_interactions.targets
    ),
    needs=frozenset({Need.TRAINING_INTERACTIONS}),
    log_scores=logarithms,
)

"""Transitions from each of the last items of a history (`core.transitions`), and no language model.

The constants have the best Recall@20 on the validation samples of MovieLens-100k, 33.7 percent. With one of them
changed it is 31.0 to 33.6 (decay 0.6 and 0.9, 5 and 20 places, smoothing 5 and 80).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from l2d_ray.core.arrays import Float64
from l2d_ray.core.decoding import ScoredItems, best_of_all
from l2d_ray.core.query import History, Query
from l2d_ray.core.transition_counts import TransitionCounts
from l2d_ray.core.transitions import Mixture, Transitions
from l2d_ray.data.samples import TrainingInteractions
from l2d_ray.recommenders.contract import Declaration, Need, Options, Recommender, logarithms

if TYPE_CHECKING:
    from l2d_ray.recommenders.resources import Resources

DECAY = 0.8
"""Factor of the weight for each further place, in the training samples and in the history."""
MIXTURE = Mixture(age_decay=DECAY, smoothing=20.0)


@dataclass(frozen=True)
class TransitionRecommender(Recommender):
    """Scores are probabilities p(v | history)."""

    transitions: Transitions

    @classmethod
    def fit(cls, interactions: TrainingInteractions, num_items: int) -> "TransitionRecommender":
        """Count the transitions to all items."""
        return cls(TransitionCounts.count([interactions], num_items, np.arange(num_items)).weigh(DECAY))

    def recommend(self, queries: Sequence[Query]) -> list[ScoredItems]:
        """Return the permitted items of the highest probability. Items that are no training target have none."""
        lists = []
        for query in queries:
            scores_I = self.probabilities(query.history)
            scores_I[self.transitions.popularity_V == 0] = -np.inf
            lists.append(best_of_all(scores_I, query.k, query.exclude, query.allow))
        return lists

    def probabilities(self, history: History) -> Float64:
        """Return p(v | history) of each item. After a title that the catalogue does not know it is p(v)."""
        return self.transitions.probabilities(history, MIXTURE)


def transitions(resources: "Resources") -> TransitionRecommender:
    """Fit the transitions. `Resources.once` shares them among recommenders."""
    return TransitionRecommender.fit(resources.training_interactions, len(resources.titles))


DECLARATION = Declaration(
    pattern="transitions",
    form="transitions",
    examples=("transitions",),
    options=Options,
    make=lambda _, resources: resources.once(transitions),
    needs=frozenset({Need.TRAINING_INTERACTIONS}),
    log_scores=logarithms,
)

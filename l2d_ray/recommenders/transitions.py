"""Transitions from each of the last items of a history, the nearest with the most weight: counts, and no training.

With item i of age 0 for the last item, and c(i, v) the weighted number of training samples of v shortly after i,

    p(v | history) = sum over i of DECAY^age(i) (c(i, v) + SMOOTHING p(v)) / (c(i) + SMOOTHING) / sum of the weights

is a mixture of Markov chains that skip items, each smoothed by the popularity p(v).

Sources: mixtures of the transitions from several last states are Raftery's model (1985). The smoothing by a prior is
Dirichlet smoothing (Zhai and Lafferty, 2004). The constants have the best Recall@20 on the validation samples of
MovieLens-100k, 33.7 percent. With one of them changed it is 31.0 to 33.6 (decay 0.6 and 0.9, 5 and 20 places, smoothing
5 and 80).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from l2d_ray.core.arrays import Float64
from l2d_ray.core.decoding import ScoredItems, best_of_all
from l2d_ray.core.query import History, Query
from l2d_ray.data.samples import TrainingInteractions
from l2d_ray.recommenders.contract import Declaration, Need, Options, Recommender

if TYPE_CHECKING:
    from l2d_ray.recommenders.resources import Resources

PLACES = 10
"""Items before a target that count as its predecessors; last items of a history that predict."""
DECAY = 0.8
"""Factor of the weight for each further place."""
SMOOTHING = 20
"""Weight of the popularity, in training samples."""


@dataclass(frozen=True)
class Transitions(Recommender):
    """Scores are probabilities p(v | history)."""

    counts_II: sparse.csr_array
    """c(i, v): training samples of v after i, each with the weight of its lag."""
    totals_I: Float64
    """c(i): the sum of each row."""
    popularity_I: Float64
    """p(v): the share of training samples whose target is v."""

    @classmethod
    def fit(cls, interactions: TrainingInteractions, num_items: int) -> "Transitions":
        """Count the pairs of an item and a training target at most `PLACES` later in the same history."""
        targets_N = np.flatnonzero(interactions.is_target)
        positions_N = interactions.positions[targets_N]
        counts_II = sparse.csr_array((num_items, num_items))
        for lag in range(1, PLACES + 1):
            later_N = targets_N[positions_N >= lag]
            pairs = interactions.items[later_N - lag], interactions.items[later_N]
            weights_N = np.full(later_N.size, DECAY ** (lag - 1))
            counts_II = counts_II + sparse.csr_array((weights_N, pairs), shape=counts_II.shape)
        popularity_I = np.bincount(interactions.targets, minlength=num_items) / max(targets_N.size, 1)
        return cls(counts_II, np.asarray(counts_II.sum(axis=1)), popularity_I)

    def recommend(self, queries: Sequence[Query]) -> list[ScoredItems]:
        """Return the permitted items of the highest probability. Items that are no training target have none."""
        lists = []
        for query in queries:
            scores_I = self.probabilities(query.history)
            scores_I[self.popularity_I == 0] = -np.inf
            lists.append(best_of_all(scores_I, query.k, query.exclude, query.allow))
        return lists

    def probabilities(self, history: History) -> Float64:
        """Return p(v | history) of each item. After a title that the catalogue does not know it is p(v)."""
        last = list(history[-PLACES:])[::-1]
        weights_A = DECAY ** np.arange(len(last))
        known_A = np.array([not isinstance(item, str) for item in last])
        items_A = np.array([item for item in last if not isinstance(item, str)], np.int64)
        shares_A = weights_A / weights_A.sum()
        shares_A[known_A] /= self.totals_I[items_A] + SMOOTHING
        shares_A[~known_A] /= SMOOTHING
        scores_I: Float64 = SMOOTHING * shares_A.sum() * self.popularity_I
        for item, share in zip(items_A.tolist(), shares_A[known_A].tolist(), strict=True):
            row = slice(*self.counts_II.indptr[item : item + 2])
            scores_I[self.counts_II.indices[row]] += share * self.counts_II.data[row]
        return scores_I


def transitions(resources: "Resources") -> Transitions:
    """Fit the transitions. `Resources.once` shares them among recommenders."""
    return Transitions.fit(resources.training_interactions, len(resources.titles))


DECLARATION = Declaration(
    pattern="transitions",
    form="transitions",
    examples=("transitions",),
    options=Options,
    make=lambda _, resources: resources.once(transitions),
    needs=frozenset({Need.TRAINING_INTERACTIONS}),
)

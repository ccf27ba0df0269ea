"""The items with the most training samples, the same for everybody: the least that a recommender must surpass."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.decoding import ScoredItems, best_items
from l2d_ray.core.query import Query
from l2d_ray.recommenders.contract import Declaration, Need, Options, Recommender, logarithms


@dataclass(frozen=True)
class MostPopular(Recommender):
    """Scores are numbers of training samples. Of equal scores, the smaller item index is first."""

    ranking: ScoredItems

    @classmethod
    def fit(cls, targets: NDArray[np.integer]) -> "MostPopular":
        """Count the targets of the training samples."""
        items_I, counts_I = np.unique(targets, return_counts=True)
        return cls(best_items([ScoredItems(items_I.astype(np.int64), counts_I.astype(np.float64))], items_I.size))

    def recommend(self, queries: Sequence[Query]) -> list[ScoredItems]:
        """Return the permitted items by decreasing popularity."""
        return [self.ranking.permitted(query.exclude, query.allow).first(query.k) for query in queries]


DECLARATION = Declaration(
    pattern="most-popular",
    form="most-popular",
    examples=("most-popular",),
    options=Options,
    make=lambda _, resources: MostPopular.fit(resources.training_interactions.targets),
    needs=frozenset({Need.TRAINING_INTERACTIONS}),
    log_scores=logarithms,
)

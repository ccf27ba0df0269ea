"""EASE^R: a linear model from all items of a history to the next one, in closed form.

X has a row for each user, with 1 for each of the user's items. With the Gram matrix G = X'X and the precision matrix
P = (G + ridge I)^-1, the weights are

    B = I - P diag(1 / diag P)

They minimise |X - XB|^2 + ridge |B|^2 with a zero diagonal. A history x has the scores xB.

Source: Steck, "Embarrassingly Shallow Autoencoders for Sparse Data" (arXiv 1905.03375), section 3.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.linalg import lapack

from l2d_ray.core.arrays import Float64
from l2d_ray.core.decoding import ScoredItems, best_of_all
from l2d_ray.core.query import History, Query, indexed_items
from l2d_ray.data.samples import TrainingInteractions
from l2d_ray.errors import InputError
from l2d_ray.recommenders.contract import Declaration, Need, Recommender, logits
from l2d_ray.recommenders.tuned import TunedOptions

if TYPE_CHECKING:
    from l2d_ray.data.dataset import Dataset
    from l2d_ray.data.samples import Sample
    from l2d_ray.recommenders.resources import Resources

MAX_ITEMS = 30_000
BYTES_PER_PAIR = 20
"""Memory of a solve for each pair of items: G in float32, P in float64, and a copy of P on the way."""


@dataclass(frozen=True)
class Gram:
    """The Gram matrix of the users' interactions, and how often each item occurs."""

    gram_II: NDArray[np.float32]
    """Numbers of users with both items; exact, because they are below 2^24."""
    shares_I: Float64
    """Share of each item among all interactions."""

    @classmethod
    def of(cls, interactions: TrainingInteractions, num_items: int) -> "Gram":
        """Count the users of each pair of items."""
        users = interactions.offsets.size - 1
        ones = np.ones(interactions.items.size, np.float32)
        rows = (ones, interactions.items, interactions.offsets)
        matrix = sparse.csr_array(rows, shape=(users, num_items), copy=True)
        matrix.sum_duplicates()  # in place
        matrix.data[:] = 1
        occurrences_I = np.bincount(interactions.items, minlength=num_items)
        return cls((matrix.T @ matrix).toarray(), occurrences_I / max(interactions.items.size, 1))

    def inverse(self, ridge: int) -> Float64:
        """Return P = (G + ridge I)^-1, by a Cholesky decomposition in place."""
        matrix_II = np.asfortranarray(self.gram_II, np.float64)
        matrix_II[np.diag_indices_from(matrix_II)] += ridge
        factor_II, failed = lapack.dpotrf(matrix_II, lower=True, overwrite_a=True)
        assert not failed, "a Gram matrix with a ridge is positive definite"
        inverse_II: Float64 = lapack.dpotri(factor_II, lower=True, overwrite_c=True)[0]
        inverse_II += np.tril(inverse_II, -1).T
        return inverse_II


@dataclass(frozen=True)
class Ease(Recommender):
    """Scores are those of the linear model. Items that no training user has are no candidates."""

    weights_II: NDArray[np.float32]
    """B: row i is what item i of a history adds to the score of every item."""
    popularity_I: Float64
    """The scores after a history without any known item."""

    @classmethod
    def fit(cls, gram: Gram, ridge: int) -> "Ease":
        """Solve for the weights."""
        weights_II = gram.inverse(ridge)
        weights_II /= -np.diag(weights_II).copy()
        np.fill_diagonal(weights_II, 0)
        return cls(weights_II.astype(np.float32), gram.shares_I)

    def recommend(self, queries: Sequence[Query]) -> list[ScoredItems]:
        """Return the permitted items of the highest scores."""
        lists = []
        for query in queries:
            scores_I = self._scores(query.history)
            scores_I[self.popularity_I == 0] = -np.inf
            lists.append(best_of_all(scores_I, query.k, query.exclude, query.allow))
        return lists

    def _scores(self, history: History) -> Float64:
        known = np.unique(indexed_items(history))
        if not known.size:
            return self.popularity_I.copy()
        scores_I: Float64 = self.weights_II[known].sum(axis=0, dtype=np.float64)
        return scores_I


@dataclass(frozen=True)
class EaseOptions(TunedOptions):
    """Options of EASE."""

    NAME, TUNED, VALUES, DEFAULT = "ease", "ridge", (50, 100, 250, 500, 1000), 250

    ridge: int

    def check(self, dataset: "Dataset", test: "Sequence[Sample]") -> None:
        """Raise InputError if there are too many items for a dense matrix."""
        if (num_items := len(dataset.items())) > MAX_ITEMS:
            raise InputError(
                f"ease: {num_items:,} items need {BYTES_PER_PAIR * num_items**2 / 1e9:,.0f} GB"
                f" of memory, and at most {MAX_ITEMS:,} are accepted; leave it out, or raise data.min_interactions"
            )


def _gram(resources: "Resources") -> Gram:
    return Gram.of(resources.training_interactions, len(resources.titles))


DECLARATION = Declaration(
    pattern=r"ease(-(?P<ridge>[1-9]\d*))?",
    form="ease[-<ridge>]",
    examples=("ease", "ease-100"),
    options=EaseOptions,
    make=lambda options, resources: Ease.fit(resources.once(_gram), options.ridge),
    needs=frozenset({Need.TRAINING_INTERACTIONS}),
    log_scores=logits,
)

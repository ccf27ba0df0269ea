"""One score in nats: the probability of each item of the catalogue, from the state and from the last items.

    log p(v | history) = TAU (m_v . h - |m_v|^2 / 2) + W log p(v | last items)
                         + [v in history] log REPEAT + [v without training samples] log UNSEEN - log Z

h is the state of the history and m_v the estimate of item v, both in the space of the index. In `whiten-within`, the
first term with TAU = 1 is the log-likelihood of the state in linear discriminant analysis, up to what all items share.
TAU is far below 1: the directions of a state are not independent, and the last items that the prior reads are also in
the prompt. m_v is a posterior mean: it moves from TITLE times what the title predicts (`core.titles`) to the mean of
memory rows as these come (`space.ItemMeans`). An item without rows is recommended by its title.

The prior p(v | last items) is `core.transitions`, with a floor that gives every item of the catalogue a probability. A
weight W above 1 sharpens it; validation samples prefer that, together with more smoothing. REPEAT is the factor for
items that the user had already. UNSEEN is the factor for items that no training sample has: the floor alone takes a new
item for one that nobody wants. Z normalises over the catalogue.

Shapes: V items of a shard, D hidden size.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.arrays import Float64, IntArray
from l2d_ray.core.query import History, indexed_items
from l2d_ray.core.transitions import Mixture, Transitions

FLOOR = 0.5
"""Training samples added to those of every item (Krichevsky and Trofimov, 1981)."""


@dataclass(frozen=True)
class Parameters:
    """The parameters of p(v | history). The defaults are from MovieLens-100k, for the space whiten-within."""

    tau: float = 0.05
    """Weight of the state."""
    prior_weight: float = 1.0
    """W: exponent of the prior."""
    age_decay: float = 0.8
    """Factor of the weight of a last item for each further place."""
    lag_decay: float = 0.8
    """Factor of the weight of a training sample for each further place between an item and the target."""
    smoothing: float = 20.0
    """Weight of the popularity, in training samples."""
    repeat: float = 1.0
    """Factor of the probability of items of the history."""
    title: float = 3.0
    """Factor of the mean that the title predicts."""
    unseen: float = 10.0
    """Factor of the probability of items without training samples: with W = 1 they count as five samples."""

    @property
    def mixture(self) -> Mixture:
        """The parameters of the prior."""
        return Mixture(self.age_decay, self.smoothing)


@dataclass(frozen=True)
class ItemScorer:
    """The scores of a shard's items, up to log Z, which all shards share.

    The score of an item does not depend on the other items of its shard, not even in its last bit.
    """

    items_V: IntArray
    """The items of the catalogue that belong to the shard, ascending."""
    means_VD: NDArray[np.float32]
    """m_v - c. c is the mean of all rows, where the space does not subtract it."""
    offset_D: Float64
    """c."""
    unseen_V: NDArray[np.bool_]
    """Whether no training sample has the item."""
    transitions: Transitions
    """With the items of the shard as targets."""
    parameters: Parameters

    @cached_property
    def half_norms_V(self) -> Float64:
        """|m_v|^2 / 2."""
        norms_V: Float64 = np.vecdot(self.means_VD, self.means_VD).astype(np.float64)
        return norms_V / 2

    def state_scores(self, query_D: Float64) -> Float64:
        """Return m_v . h - |m_v|^2 / 2 of each item [V], given the mapped state."""
        # A product for each row: those of a matrix product depend, in their last bit, on the number of rows.
        products_V = np.vecdot(self.means_VD, (query_D - self.offset_D).astype(np.float32))
        scores_V: Float64 = products_V - self.half_norms_V
        return scores_V

    def log_scores(self, query_D: Float64, history: History) -> Float64:
        """Return log p(v | history) + log Z of each item [V], given the mapped state of the history."""
        parameters = self.parameters
        prior_V = self.transitions.probabilities(history, parameters.mixture)
        scores_V: Float64 = parameters.prior_weight * np.log(prior_V)
        scores_V += parameters.tau * self.state_scores(query_D)
        scores_V[np.isin(self.items_V, indexed_items(history))] += np.log(parameters.repeat)
        scores_V[self.unseen_V] += np.log(parameters.unseen)
        return scores_V


def log_sum_exp(scores_V: Float64) -> float:
    """Return log Z of some items; -inf without items."""
    if not scores_V.size:
        return -np.inf
    largest = scores_V.max()
    return float(largest + np.log(np.exp(scores_V - largest).sum()))

"""The fit of the parameters of p(v | history) on validation samples.

Neither the memory nor the counts contain a validation sample. The parameters maximise the likelihood of the samples'
targets times a weak prior around the defaults, which decides where there are few samples (maximum a posteriori).

Shapes: U samples, V items of the catalogue, T parameters.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from functools import cached_property

import numpy as np
from scipy import special

from l2d_ray.core.arrays import Float64, FloatArray, IntArray, Integers
from l2d_ray.core.posterior import FLOOR, Parameters
from l2d_ray.core.transition_counts import TransitionCounts
from l2d_ray.core.transitions import last_items

_IS_DECAY_T = np.array([field.name.endswith("decay") for field in fields(Parameters)])


@dataclass(frozen=True)
class ValidationScores:
    """Validation samples, and what the likelihood of their targets depends on."""

    state_scores_UV: FloatArray
    """c_v . h - |c_v|^2 / 2 of each sample and item. c_v is the mean of the item around the prior mean 0."""
    title_scores_UV: FloatArray
    """r_v . (h - c_v). r_v is what the prior mean that the title predicts adds to c_v: m_v = c_v + TITLE r_v."""
    title_norms_V: FloatArray
    """|r_v|^2 / 2."""
    histories: Sequence[Integers]
    targets_U: IntArray
    counts: TransitionCounts
    """With all items as targets; at least the pairs of the last items of the histories."""

    @cached_property
    def _last_items_UA(self) -> IntArray:
        return last_items(self.histories)

    @cached_property
    def _seen(self) -> tuple[IntArray, IntArray]:
        """Each sample and item of its history, once."""
        items = [np.unique(history) for history in self.histories]
        return np.repeat(np.arange(len(items)), list(map(len, items))), np.concatenate(items).astype(np.int64)

    def cross_entropy(self, parameters: Parameters) -> float:
        """Return the mean of -log p(target | history), in nats."""
        transitions = self.counts.weigh(parameters.lag_decay, FLOOR)
        prior_UV = transitions.probabilities_after(self._last_items_UA, parameters.mixture)
        scores_UV = parameters.prior_weight * np.log(prior_UV)
        scores_UV += parameters.tau * self._state_scores(parameters.title)
        scores_UV[self._seen] += np.log(parameters.repeat)
        scores_UV[:, self.counts.samples_V == 0] += np.log(parameters.unseen)
        of_targets_U = scores_UV[np.arange(self.targets_U.size), self.targets_U]
        return float((special.logsumexp(scores_UV, axis=1) - of_targets_U).mean())

    def _state_scores(self, title: float) -> FloatArray:
        """Return m_v . h - |m_v|^2 / 2 of each sample and item."""
        scores_UV: FloatArray = self.state_scores_UV + title * self.title_scores_UV - title**2 * self.title_norms_V
        return scores_UV

    def fit(self) -> Parameters:
        """Return the parameters that maximise the posterior, to four digits; the defaults without samples.

        Each parameter's prior is a normal distribution around its default, with variance 1 for its logarithm, or for
        the logit of a decay, which is below 1.
        """
        from scipy import optimize  # it takes half a second, and most processes fit nothing

        start_T, samples = _to_line(Parameters()), self.targets_U.size
        if not samples:
            return Parameters()

        def loss(point_T: Float64) -> float:
            return self.cross_entropy(_from_line(point_T)) + float(np.square(point_T - start_T).sum()) / (2 * samples)

        options = {"eps": 1e-4, "ftol": 1e-7, "maxiter": 50}
        found = optimize.minimize(loss, start_T, method="L-BFGS-B", options=options)
        return Parameters(*(float(f"{value:.4g}") for value in astuple(_from_line(found.x))))


def _to_line(parameters: Parameters) -> Float64:
    """Return the logits of decays, and the logarithms of the other parameters."""
    values_T = np.array(astuple(parameters))
    line_T: Float64 = np.where(_IS_DECAY_T, special.logit(values_T), np.log(values_T))
    return line_T


def _from_line(point_T: Float64) -> Parameters:
    """Undo `_to_line`."""
    return Parameters(*np.where(_IS_DECAY_T, special.expit(point_T), np.exp(point_T)).tolist())

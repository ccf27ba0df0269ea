"""One probability from the scores of several recommenders, and the fit of their weights on validation samples.

    log p(v | history) = sum over parts k of w_k x_k(v) + [v in history] log R - log Z

x_k(v) is the log-probability of part k, up to a factor and a constant, both of which the fit absorbs. R is the factor
for items that the user had already, and Z normalises over the catalogue. This is a logarithmic opinion pool (Genest and
Zidek, 1986). The loss is convex in the weights and in log R.

Shapes: K parts, U samples, I items of the catalogue, T parameters.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from scipy import special

from l2d_ray.core.arrays import Float64, FloatArray, IntArray

Pairs = tuple[IntArray, IntArray]
"""Numbers of samples and of items in their histories: row and column of each pair."""


@dataclass(frozen=True)
class FusionWeights:
    """The parameters of a fusion."""

    parts_K: tuple[float, ...]
    """w: weight of each part, at least 0."""
    log_repeat: float = 0.0
    """log R."""

    @classmethod
    def equal(cls, parts: int) -> Self:
        """Return the weights of a fusion that was not fitted: 1 for each part."""
        return cls((1.0,) * parts)

    def log_probabilities(self, logs_KUI: FloatArray, seen: Pairs) -> Float64:
        """Return log p [U, I] of every item.

        The probabilities of a sample do not depend on the other samples, not even in their last bits.
        """
        scores_UI = np.zeros(logs_KUI.shape[1:])
        for weight, logs_UI in zip(self.parts_K, logs_KUI, strict=True):
            scores_UI += weight * logs_UI
        scores_UI[seen] += self.log_repeat
        scores_UI -= special.logsumexp(scores_UI, axis=1, keepdims=True)
        return scores_UI


@dataclass(frozen=True)
class FusionSamples:
    """Validation samples, and what the parts of a fusion say of them."""

    logs_KUI: FloatArray
    seen: Pairs
    """Each item of a sample's history, once."""
    targets_U: IntArray

    @cached_property
    def _deviations_K(self) -> Float64:
        """Deviation of each part's scores among the items of a sample."""
        deviations_K: Float64 = np.sqrt([np.var(logs_UI, axis=1).mean() for logs_UI in self.logs_KUI])
        return deviations_K

    def cross_entropy(self, weights: FusionWeights) -> float:
        """Return the mean of -log p(target | history), in nats."""
        return self._loss(np.array([*weights.parts_K, weights.log_repeat]))[0]

    def fit(self) -> FusionWeights:
        """Return the weights that maximise the posterior, to four digits; equal weights without samples.

        The prior decides where there are few samples. It is normal with mean 1 for a weight and 0 for log R. Its
        deviation is 1 for log R, and for a weight in units in which the part's scores have deviation 1.
        """
        from scipy import optimize  # it takes half a second, and most processes fit nothing

        equal, samples = FusionWeights.equal(len(self.logs_KUI)), self.targets_U.size
        if not samples:
            return equal
        start_T = np.array([*equal.parts_K, equal.log_repeat])
        precision_T = np.append(np.square(self._deviations_K), 1.0)

        def penalised(point_T: Float64) -> tuple[float, Float64]:
            loss, gradient_T = self._loss(point_T)
            beyond_T = precision_T * (point_T - start_T)
            return loss + float(beyond_T @ (point_T - start_T)) / (2 * samples), gradient_T + beyond_T / samples

        bounds = [(0.0, None)] * len(equal.parts_K) + [(None, None)]
        options = {"ftol": 1e-9, "maxiter": 100}
        found = optimize.minimize(penalised, start_T, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        *parts, log_repeat = (float(f"{value:.4g}") for value in found.x.tolist())
        return FusionWeights(tuple(parts), log_repeat)

    def _loss(self, point_T: Float64) -> tuple[float, Float64]:
        """Return the cross-entropy and its gradient at the weights of the parts and log R."""
        *parts, log_repeat = point_T.tolist()
        probabilities_UI = FusionWeights(tuple(parts), log_repeat).log_probabilities(self.logs_KUI, self.seen)
        users_U = np.arange(self.targets_U.size)
        loss = -float(probabilities_UI[users_U, self.targets_U].mean())
        np.exp(probabilities_UI, out=probabilities_UI)
        expected = probabilities_UI[self.seen].sum()
        probabilities_UI[users_U, self.targets_U] -= 1  # the gradient with respect to the scores
        gradient_K = [np.vdot(probabilities_UI, logs_UI) for logs_UI in self.logs_KUI]
        gradient_T = np.array([*gradient_K, expected - self._repeated])
        return loss, gradient_T / users_U.size

    @cached_property
    def _repeated(self) -> int:
        """Number of samples whose target is in the history."""
        rows, items = self.seen
        return int(np.count_nonzero(self.targets_U[rows] == items))

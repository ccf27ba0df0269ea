"""Item means predicted from titles, so that an item without memory rows has a place: ridge regression.

Features are a title's state of the language model, standardised in each dimension, and a constant. Targets are the
means of the items' rows in the space of the index, less the offset of the space. The mean of n rows counts
n / (1 + b n), the inverse of its variance around the item's place, with b = `space.ItemMeans.ratio`.

The prediction for an item leaves its rows out, or they would count twice in its posterior mean. The ridge is the one
with the smallest error of these predictions. Both are exact (Golub, Heath and Wahba, Technometrics 1979). Everything
is a sum over items, which adds up over shards.

Shapes: I items, E features, D hidden size.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import numpy as np

from l2d_ray.core.arrays import Float64, FloatArray

RIDGES = tuple(10.0**power for power in range(-4, 3))
"""Ridges to compare, each times the mean eigenvalue of the Gram matrix."""


class Titles(NamedTuple):
    """Some items, with what predicts their means."""

    features_IE: Float64
    means_ID: Float64
    """Mean of the rows of each item; 0 without rows."""
    weights_I: Float64
    """Weight of each mean; 0 without rows."""


@dataclass(frozen=True)
class Standardisation:
    """The map from the states of titles to features."""

    mean_D: Float64
    scale_D: Float64

    @classmethod
    def of(cls, states_ID: FloatArray) -> Self:
        """Return the map for the titles of a catalogue; a dimension without variance becomes 0."""
        scale_D = states_ID.std(axis=0, dtype=np.float64)
        return cls(states_ID.mean(axis=0, dtype=np.float64), np.where(scale_D > 0, scale_D, 1))

    def __call__(self, states_ID: FloatArray) -> Float64:
        """Return the features [I, E] of titles: standardised states, and 1."""
        features_ID = (states_ID - self.mean_D) / self.scale_D
        return np.hstack([features_ID, np.ones((len(features_ID), 1))])


@dataclass(frozen=True)
class TitleRegression:
    """Ridge regression of item means on titles, in the directions in which the Gram matrix is diagonal."""

    axes_EE: Float64
    """Directions, as columns."""
    values_E: Float64
    """Eigenvalues of the Gram matrix, with the ridge."""
    cross_ED: Float64
    """Sum of the weighted products of features and means, along these directions."""

    @classmethod
    def fit(cls, parts: Callable[[], Iterable[Titles]]) -> Self:
        """Fit to the items of all parts, which are read twice."""
        products = [_products(part) for part in parts()]
        gram_EE, cross_ED = (np.sum([product[number] for product in products], axis=0) for number in (0, 1))
        values_E, axes_EE = np.linalg.eigh(gram_EE)
        values_E, scale = np.maximum(values_E, 0), np.trace(gram_EE) / len(gram_EE)
        plain = cls(axes_EE, values_E, axes_EE.T @ cross_ED)
        if not scale:  # there are no rows
            return replace(plain, values_E=values_E + 1)
        ridges = plain._ridges(scale)
        errors = np.sum([plain._errors(ridges, part) for part in parts()], axis=0)
        return ridges[int(np.argmin(errors))]

    def leave_own_out(self, titles: Titles) -> Float64:
        """Return the means [I, D] that a regression on all other items predicts for each item."""
        return self._leave_own_out(titles, titles.features_IE @ self.axes_EE)

    def _leave_own_out(self, titles: Titles, projected_IE: Float64) -> Float64:
        scaled_IE = projected_IE / self.values_E
        own_I1 = (titles.weights_I * np.vecdot(scaled_IE, projected_IE))[:, None]
        predicted_ID: Float64 = (scaled_IE @ self.cross_ED - own_I1 * titles.means_ID) / (1 - own_I1)
        return predicted_ID

    def _ridges(self, scale: float) -> list[Self]:
        return [replace(self, values_E=self.values_E + ridge * scale) for ridge in RIDGES]

    def _errors(self, ridges: Iterable[Self], titles: Titles) -> list[float]:
        """Return the weighted sum of the squared errors of `leave_own_out` for each ridge; the axes are the same."""
        projected_IE = titles.features_IE @ self.axes_EE
        errors = (ridge._leave_own_out(titles, projected_IE) - titles.means_ID for ridge in ridges)
        return [float(titles.weights_I @ np.vecdot(errors_ID, errors_ID)) for errors_ID in errors]


def _products(titles: Titles) -> tuple[Float64, Float64]:
    weighted_IE = titles.features_IE * titles.weights_I[:, None]
    return weighted_IE.T @ titles.features_IE, weighted_IE.T @ titles.means_ID

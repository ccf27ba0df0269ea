"""The space in which distances are taken: a linear map fitted on the memory, applied to rows and queries alike.

The hidden states of a language model are far from isotropic: a few directions carry most of the variance and say little
about the next item.

- `none`: no map. This is the paper's setting.
- `centre`: subtract the mean. No distance changes, but float16 stays accurate.
- `whiten-total`: divide by the covariance of all rows.
- `whiten-within`: divide by the covariance within items. With item means, L2D-G is then linear discriminant analysis
  (Fisher, 1936; Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, section 4.3). The mean of an
  item with few rows is shrunk to its posterior mean (`ItemMeans`).

Shapes: D hidden size, N vectors, I items.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from l2d_ray.core.arrays import Amounts, Float64, FloatArray
from l2d_ray.core.moments import Moments

SpaceKind = Literal["none", "centre", "whiten-total", "whiten-within"]
_SMALLEST_EIGENVALUE = 1e-10
"""Smallest eigenvalue of a covariance, relative to the largest. Prevents a division by zero along a direction without
variance."""


@dataclass(frozen=True)
class LinearMap:
    """The map x -> (x - mean) matrix; either part may be missing."""

    mean_D: Float64 | None = None
    matrix_DD: Float64 | None = None

    def __call__(self, vectors_ND: FloatArray) -> Float64:
        """Map vectors [N, D] to float64."""
        mapped_ND = vectors_ND.astype(np.float64)
        if self.mean_D is not None:
            mapped_ND -= self.mean_D
        if self.matrix_DD is None:
            return mapped_ND
        with np.errstate(invalid="ignore"):  # a vector that is not finite stays that way
            return mapped_ND @ self.matrix_DD


@dataclass(frozen=True)
class ItemMeans:
    """The estimate of an item from the mean of its n rows: that mean itself, or its posterior mean.

    An item without rows has the mean 0.

    In `whiten-within` the rows of an item scatter around its true mean with variance s^2 in every direction. The true
    means scatter around 0 with a variance b that differs by direction (probabilistic LDA: Ioffe, ECCV 2006). In each
    direction, the posterior mean is the mean of the rows times b / (b + s^2 / n). Along directions in which items
    hardly differ, the mean of a few rows is mostly noise (empirical Bayes: Efron and Morris, JASA 1973).
    """

    axes_DD: Float64 | None = None
    """Directions, as columns."""
    signal_D: Float64 | None = None
    """Ratio b / s^2 along each direction."""

    def __call__(self, means_ID: Float64, counts_I: Amounts) -> Float64:
        """Estimate items from the means of their mapped rows and the numbers, or sums of weights, of these rows."""
        if self.axes_DD is None or self.signal_D is None:
            return np.where(counts_I[:, None] > 0, means_ID, 0)
        with np.errstate(divide="ignore"):  # without rows, the share is 0
            share_ID = self.signal_D / (self.signal_D + 1 / counts_I[:, None])
        return ((means_ID @ self.axes_DD) * share_ID) @ self.axes_DD.T

    @property
    def ratio(self) -> float:
        """Mean of b / s^2 over the directions; 1 if the means of the rows are the estimate."""
        return 1.0 if self.signal_D is None else float(self.signal_D.mean())


def fit_means(moments: Moments, kind: SpaceKind, space: LinearMap) -> ItemMeans:
    """Return the estimate of items in a space; in `whiten-within`, fit its variances by the method of moments."""
    if kind != "whiten-within" or space.mean_D is None or space.matrix_DD is None:
        return ItemMeans()
    within_DD = space.matrix_DD @ _covariance(moments, kind) @ space.matrix_DD
    of_means_DD = moments.item_outer_DD / moments.rows - np.outer(space.mean_D, space.mean_D)
    between_DD = space.matrix_DD @ of_means_DD @ space.matrix_DD - within_DD * (moments.items / moments.rows)
    variances_D, axes_DD = np.linalg.eigh(between_DD)
    return ItemMeans(axes_DD, np.maximum(variances_D, 0) / (np.trace(within_DD) / len(within_DD)))


def fit_map(moments: Moments, kind: SpaceKind, shrinkage: float) -> LinearMap:
    """Return the map of a space, from the moments of a memory of at least one row.

    The covariance C is shrunk to (1 - s) C + s tr(C) / D I (Ledoit and Wolf, 2004). The map is its inverse square root.
    Raises ValueError if the rows have no such covariance: all rows are the same, or (`whiten-within`) no item occurs
    twice.
    """
    if kind == "none":
        return LinearMap()
    mean_D = moments.sum_D / moments.rows
    if kind == "centre":
        return LinearMap(mean_D)
    return LinearMap(mean_D, _inverse_square_root(_covariance(moments, kind), shrinkage))


def drift(moments: Moments, fitted: Moments, kind: SpaceKind, space: LinearMap) -> float:
    """Return how far a memory moved since a map was fitted to `fitted`: the change of its distances, as a share.

    With the covariance C of `kind` in the mapped space then and now, it is |C_now - C_then| / |C_then| in the Frobenius
    norm. If it is larger, it is the distance of the means, as the root mean square over the directions: 1 is a standard
    deviation. It is 0 for a space that divides by no covariance, because its distances cannot change. Raises ValueError
    as `fit_map` does.
    """
    if space.matrix_DD is None:
        return 0.0
    now_DD, then_DD = (space.matrix_DD @ _covariance(part, kind) @ space.matrix_DD for part in (moments, fitted))
    moved_D = (moments.sum_D / moments.rows - fitted.sum_D / fitted.rows) @ space.matrix_DD
    change = np.linalg.norm(now_DD - then_DD) / np.linalg.norm(then_DD)
    return float(max(change, np.linalg.norm(moved_D) / np.sqrt(moved_D.size)))


def _covariance(moments: Moments, kind: SpaceKind) -> Float64:
    if kind == "whiten-within":
        between_DD, means = moments.item_outer_DD, moments.items
    else:
        between_DD, means = np.outer(moments.sum_D, moments.sum_D) / moments.rows, 1
    if moments.rows <= means:
        raise ValueError(f"{moments.rows} rows of {moments.items} items have no {kind} covariance")
    covariance: Float64 = (moments.outer_DD - between_DD) / (moments.rows - means)
    return covariance


def _inverse_square_root(covariance_DD: Float64, shrinkage: float) -> Float64:
    dimension = len(covariance_DD)
    variance = np.trace(covariance_DD) / dimension
    values_D, vectors_DD = np.linalg.eigh(covariance_DD)
    values_D = (1 - shrinkage) * values_D + shrinkage * variance
    if not values_D[-1] > 0:
        raise ValueError("all rows are the same: they have no covariance")
    values_D = np.maximum(values_D, _SMALLEST_EIGENVALUE * values_D[-1])
    root_DD: Float64 = (vectors_DD / np.sqrt(values_D)) @ vectors_DD.T
    return root_DD

"""The space in which distances are taken: a linear map fitted on the memory and applied to rows and queries alike.

The hidden states of a language model are far from isotropic: a few directions carry most of the variance and say little
about the next item. `none` is plain L2, the paper's setting. `centre` subtracts the mean, which changes no distance but
keeps float16 accurate. `whiten-total` divides by the covariance of all rows. `whiten-within` divides by the covariance
inside items: with item means (L2D-G) the nearest item is then that of linear discriminant analysis (Fisher, 1936;
Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, section 4.3), and the mean of an item with few
rows is not taken at its word (`ItemMeans`).

Shapes: D hidden size, N vectors, I items.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.aggregation import Float64, Moments

SpaceKind = Literal["none", "centre", "whiten-total", "whiten-within"]
_SMALLEST_EIGENVALUE = 1e-10
"""Of the covariance, relative to the largest: a direction without variance must not divide by zero."""


@dataclass(frozen=True)
class LinearMap:
    """x -> (x - mean) matrix; either may be missing."""

    mean_D: Float64 | None = None
    matrix_DD: Float64 | None = None

    def __call__(self, vectors_ND: NDArray[np.floating]) -> Float64:
        """The mapped vectors [N, D], float64."""
        mapped_ND = vectors_ND.astype(np.float64)
        if self.mean_D is not None:
            mapped_ND -= self.mean_D
        if self.matrix_DD is None:
            return mapped_ND
        with np.errstate(invalid="ignore"):  # a vector that is not finite stays so
            return mapped_ND @ self.matrix_DD


@dataclass(frozen=True)
class ItemMeans:
    """What is known of an item from the mean of its n rows: the mean itself, or its posterior mean.

    In `whiten-within` an item's rows scatter around its true mean with variance s^2 in every direction, and the true
    means around their own mean, which is 0, with a variance b that differs by direction (probabilistic LDA: Ioffe, ECCV
    2006). The posterior mean is the mean of the rows times b / (b + s^2 / n) in each direction: what a few rows say
    along directions in which items hardly differ is noise (empirical Bayes: Efron and Morris, JASA 1973).
    """

    axes_DD: Float64 | None = None
    """The directions, as columns."""
    signal_D: Float64 | None = None
    """b / s^2 along each."""

    def __call__(self, means_ID: Float64, counts_I: NDArray[np.integer]) -> Float64:
        """From the means of the mapped rows of each item, and their numbers."""
        if self.axes_DD is None or self.signal_D is None:
            return means_ID
        share_ID = self.signal_D / (self.signal_D + 1 / counts_I[:, None])
        return ((means_ID @ self.axes_DD) * share_ID) @ self.axes_DD.T


def fit_means(moments: Moments, kind: SpaceKind, space: LinearMap) -> ItemMeans:
    """How items are estimated in a space: in `whiten-within` with variances by the method of moments."""
    if kind != "whiten-within" or space.mean_D is None or space.matrix_DD is None:
        return ItemMeans()
    within_DD = space.matrix_DD @ _covariance(moments, kind) @ space.matrix_DD
    of_means_DD = moments.item_outer_DD / moments.rows - np.outer(space.mean_D, space.mean_D)
    between_DD = space.matrix_DD @ of_means_DD @ space.matrix_DD - within_DD * (moments.items / moments.rows)
    variances_D, axes_DD = np.linalg.eigh(between_DD)
    return ItemMeans(axes_DD, np.maximum(variances_D, 0) / (np.trace(within_DD) / len(within_DD)))


def fit_map(moments: Moments, kind: SpaceKind, shrinkage: float) -> LinearMap:
    """The map of a space, from the moments of a memory of at least one row.

    The covariance C is shrunk to (1 - s) C + s tr(C) / D I (Ledoit and Wolf, 2004), and the map is its inverse square
    root. Raises ValueError where the rows have no such covariance: all the same, or (`whiten-within`) no item twice.
    """
    if kind == "none":
        return LinearMap()
    mean_D = moments.sum_D / moments.rows
    if kind == "centre":
        return LinearMap(mean_D)
    return LinearMap(mean_D, _inverse_square_root(_covariance(moments, kind), shrinkage))


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

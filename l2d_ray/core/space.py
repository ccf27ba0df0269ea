"""The space in which distances are taken: a linear map fitted on the memory and applied to rows and queries alike.

The hidden states of a language model are far from isotropic: a few directions carry most of the variance and say little
about the next item. `none` is plain L2, the paper's setting. `centre` subtracts the mean, which changes no distance but
keeps float16 accurate. `whiten-total` divides by the covariance of all rows. `whiten-within` divides by the covariance
inside items: with item means (L2D-G) the nearest item is then that of linear discriminant analysis (Fisher, 1936;
Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, section 4.3).

Shapes: D hidden size, N vectors.
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

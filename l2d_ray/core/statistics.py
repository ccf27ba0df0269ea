"""The paired comparison of two recommenders on the same samples, by a bootstrap over users.

Shapes: U samples, G users.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.arrays import Float64

RESAMPLES = 10_000
DRAWS_AT_ONCE = 2_000_000
"""Users drawn at once, over several resamples: 50 MB."""


@dataclass(frozen=True)
class Ratio:
    """The ratio of two means over the same samples, with its 95% interval."""

    value: float | None
    """None if the second mean is 0."""
    low: float | None
    """None if there are fewer than two users, if both means are 0, or if the second one is 0 in most resamples."""
    high: float | None
    """None as `low`, or if the interval has no upper end: the second mean is 0 in many resamples."""

    @property
    def above(self) -> bool | None:
        """Whether the whole interval is above 1; None if the ratio or the interval is undefined."""
        return None if self.value is None or self.low is None else self.low > 1


def paired_ratio(ours_U: Float64, theirs_U: Float64, users_U: NDArray[np.integer]) -> Ratio:
    """Return the ratio of two means, where `ours_U` and `theirs_U` are values of the same samples, 0 or above.

    Each of 10,000 resamples draws users, and counts all samples of a user together, because they are correlated. Both
    recommenders have the same draw. Percentile method: Efron and Tibshirani, An Introduction to the Bootstrap,
    chapter 13.
    """
    from scipy import stats  # not above: it takes most of a second, and few processes that import this need it

    _, user_U = np.unique(users_U, return_inverse=True)
    ours_G, theirs_G = (np.bincount(user_U, weights=values_U) for values_U in (ours_U, theirs_U))
    value = float(ours_G.sum() / theirs_G.sum()) if theirs_G.any() else None
    if ours_G.size < 2 or not (ours_G.any() or theirs_G.any()):
        return Ratio(value, None, None)
    interval = stats.bootstrap(
        (ours_G, theirs_G),
        _share,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, DRAWS_AT_ONCE // ours_G.size),
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Ratio(value, _ratio(float(interval.low)), _ratio(float(interval.high)))


def _share(ours: Float64, theirs: Float64, axis: int) -> Float64:
    """Return our share of both sums, and a half if both are 0.

    The share is finite in every resample, where the ratio is not. A percentile interval of one is that of the other.
    """
    ours, theirs = ours.sum(axis=axis), theirs.sum(axis=axis)
    total = ours + theirs
    share: Float64 = np.divide(ours, total, out=np.full_like(total, 0.5), where=total > 0)
    return share


def _ratio(share: float) -> float | None:
    """Return the ratio of which this is the share; None if there is none."""
    return share / (1 - share) if share < 1 else None

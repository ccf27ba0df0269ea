"""The summary of a recommender's ranks: a row of the report, with metrics as a whole and for groups of targets.

Metrics are over the full catalogue, without sampled negatives, with one target per sample. A target is *cold* if no
training sample has it. The others are *dense* or *sparse*: above the median number of training samples, or not.

Shapes: U samples.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.metrics import IntArray, bootstrap_intervals, ndcg, recall

CUTOFFS = (20, 50, 100)
GROUPS = ("dense", "sparse", "cold")


@dataclass(frozen=True)
class Metrics:
    """Means over samples."""

    users: int
    """Number of samples. The report calls a sample a user: one history, and what came next."""
    means: dict[str, float]
    """By `recall@K` and `ndcg@K`; empty without samples."""
    intervals: dict[str, tuple[float, float]]
    """95% interval of each mean. Resampling keeps a user's samples together."""

    def to_json(self) -> dict[str, Any]:
        """Return the metrics as the report has them."""
        return {**self.means, "users": self.users} | ({"intervals": self.intervals} if self.users else {})


@dataclass(frozen=True)
class Row:
    """Quality and cost of one recommender."""

    recommender: str
    metrics: Metrics
    seconds_per_user: float
    tokens_per_user: float
    groups: dict[str, Metrics]
    """Metrics for each of `GROUPS`."""

    def to_json(self) -> dict[str, Any]:
        """Return the row as the report has it."""
        return {
            "recommender": self.recommender,
            **self.metrics.to_json(),
            "seconds_per_user": self.seconds_per_user,
            "tokens_per_user": self.tokens_per_user,
            "groups": {group: metrics.to_json() for group, metrics in self.groups.items()},
        }


def groups_of(targets_U: NDArray[np.integer], training_targets: NDArray[np.integer]) -> NDArray[np.str_]:
    """Return the group [U] of each target."""
    size = int(max(targets_U.max(initial=0), training_targets.max(initial=0))) + 1
    rows_U = np.bincount(training_targets, minlength=size)[targets_U]
    median = np.median(rows_U[rows_U > 0]) if (rows_U > 0).any() else 0
    return np.where(rows_U == 0, "cold", np.where(rows_U > median, "dense", "sparse"))


def summarise(
    recommender: str,
    ranks_U: IntArray,
    users_U: IntArray,
    groups_U: NDArray[np.str_],
    seconds: float,
    tokens: float,
) -> Row:
    """Return the row of a recommender, given the rank, user and group of each target, and the cost per sample."""
    return Row(
        recommender=recommender,
        metrics=_metrics(ranks_U, users_U),
        seconds_per_user=round(seconds, 6),
        tokens_per_user=round(tokens, 1),
        groups={group: _metrics(ranks_U[groups_U == group], users_U[groups_U == group]) for group in GROUPS},
    )


def _metrics(ranks_U: IntArray, users_U: IntArray) -> Metrics:
    if not ranks_U.size:
        return Metrics(0, {}, {})
    metrics = {"recall": recall, "ndcg": ndcg}
    values = {f"{name}@{k}": metric(ranks_U, k) for name, metric in metrics.items() for k in CUTOFFS}
    bounds = bootstrap_intervals(np.stack([*values.values()], axis=1), users_U).round(5).tolist()
    return Metrics(
        users=int(ranks_U.size),
        means={name: round(float(values_U.mean()), 5) for name, values_U in values.items()},
        intervals={name: (low, high) for name, (low, high) in zip(values, bounds, strict=True)},
    )

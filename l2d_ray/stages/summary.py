"""The summary of a recommender's ranks: a row of the report, with metrics as a whole and for groups of targets.

Metrics are over the full catalogue, without sampled negatives, with one target per sample. A target is *cold* if no
training sample has it. The others are *dense* or *sparse*: above the median number of training samples, or not.

The *head* of the catalogue is the fewest items that together are the targets of half of the training samples. All other
items, cold ones included, are its *tail*.

Shapes: U samples, I items.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from l2d_ray.core.arrays import Float64, Integers
from l2d_ray.core.metrics import bootstrap_intervals, ndcg, recall
from l2d_ray.core.statistics import Ratio, paired_ratio

CUTOFFS = (20, 50, 100)
TOP = CUTOFFS[0]
"""Length of the lists that count for the coverage and for the ratios."""


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
    coverage: float
    """Share of the catalogue that is among the first 20 of any sample."""

    def to_json(self) -> dict[str, Any]:
        """Return the row as the report has it."""
        return {
            "recommender": self.recommender,
            **self.metrics.to_json(),
            "coverage": self.coverage,
            "seconds_per_user": self.seconds_per_user,
            "tokens_per_user": self.tokens_per_user,
            "groups": {group: metrics.to_json() for group, metrics in self.groups.items()},
        }


@dataclass(frozen=True)
class PairedRatio:
    """Recall@20 of the reference divided by that of another recommender, on the same samples."""

    reference: str
    recommender: str
    samples: int
    ratio: Ratio

    def to_json(self) -> dict[str, Any]:
        """Return the ratio as the report has it."""
        interval = [self.ratio.low, self.ratio.high]
        found = {"ratio": self.ratio.value, "interval": interval, "above": self.ratio.above}
        return {"reference": self.reference, "recommender": self.recommender, "samples": self.samples, **found}


GROUPS = ("dense", "sparse", "cold", "head", "tail")


@dataclass(frozen=True)
class ItemFrequencies:
    """The catalogue: how often each item is the target of a training sample."""

    counts_I: NDArray[np.int64]

    @classmethod
    def of(cls, training_targets: Integers, num_items: int) -> "ItemFrequencies":
        """Count the training samples of each item."""
        return cls(np.bincount(training_targets, minlength=num_items))

    def groups(self, targets_U: Integers) -> dict[str, NDArray[np.bool_]]:
        """Return which targets [U] are in each of `GROUPS`."""
        rows_U = self.counts_I[targets_U]
        median = np.median(rows_U[rows_U > 0]) if (rows_U > 0).any() else 0
        cold_U, dense_U, head_U = rows_U == 0, rows_U > median, self.head_I[targets_U]
        return {"dense": dense_U, "sparse": ~cold_U & ~dense_U, "cold": cold_U, "head": head_U, "tail": ~head_U}

    @property
    def head_I(self) -> NDArray[np.bool_]:
        """Whether each item is in the head; of equally frequent items, the first ones."""
        order_I = np.argsort(-self.counts_I, kind="stable")
        before_I = np.cumsum(self.counts_I[order_I]) - self.counts_I[order_I]
        head_I = np.zeros(self.counts_I.size, np.bool_)
        head_I[order_I] = before_I < self.counts_I.sum() / 2
        return head_I

    def coverage(self, lists: Sequence[pa.Array]) -> float:
        """Return the share of the items that are in any of these arrays of lists."""
        found = {item for part in lists for item in part.flatten().unique().to_pylist()}
        return round(len(found) / self.counts_I.size, 5)


def summarise(recommender: str, ranks: pa.Table, frequencies: ItemFrequencies) -> Row:
    """Return the row of a recommender, given its rows of `Evaluator.ranks`."""
    names = ("target", "rank", "user_hash", "seconds", "tokens")
    targets_U, ranks_U, users_U, seconds_U, tokens_U = (ranks[name].to_numpy() for name in names)
    groups = frequencies.groups(targets_U)
    return Row(
        recommender=recommender,
        metrics=_metrics(ranks_U, users_U),
        seconds_per_user=round(float(seconds_U.mean()), 6),
        tokens_per_user=round(float(tokens_U.mean()), 1),
        groups={group: _metrics(ranks_U[in_U], users_U[in_U]) for group, in_U in groups.items()},
        coverage=frequencies.coverage(ranks["top"].chunks),
    )


def ratios_to(reference: str, ranks: Mapping[str, pa.Table]) -> list[PairedRatio]:
    """Return Recall@20 of the reference divided by that of each other recommender, given their rows by name.

    The rows are those of `Evaluator.ranks` for the same samples in the same order.
    """
    users_U = ranks[reference]["user_hash"].to_numpy()
    found_U = {name: recall(table["rank"].to_numpy(), TOP) for name, table in ranks.items()}
    return [
        PairedRatio(reference, name, len(users_U), paired_ratio(found_U[reference], theirs_U, users_U))
        for name, theirs_U in found_U.items()
        if name != reference
    ]


def changes_since(earlier: pa.Table, ranks: Mapping[str, pa.Table]) -> dict[str, Metrics]:
    """Return the metrics of recommenders less those that they had in an earlier report, on the samples of both.

    `earlier` has the rows of reports/*.parquet, `ranks` those of `Evaluator.ranks` by the name of the recommender. A
    recommender that the earlier report lacks is left out.
    """
    changes = {}
    for name, now in ranks.items():
        then = earlier.filter(pa.compute.equal(earlier["recommender"], name))
        then = then.filter(pa.compute.equal(then["run"], now["run"][0])).select(["sample_id", "rank"])
        both = now.select(["sample_id", "user_hash", "rank"]).join(
            then, "sample_id", join_type="inner", right_suffix="_then"
        )
        if both.num_rows:
            users_U, now_U, then_U = (both[column].to_numpy() for column in ("user_hash", "rank", "rank_then"))
            before = _values(then_U)
            changes[name] = _means({key: values_U - before[key] for key, values_U in _values(now_U).items()}, users_U)
    return changes


def _metrics(ranks_U: NDArray[np.int64], users_U: NDArray[np.int64]) -> Metrics:
    return _means(_values(ranks_U), users_U) if ranks_U.size else Metrics(0, {}, {})


def _values(ranks_U: NDArray[np.int64]) -> dict[str, Float64]:
    """Return the value [U] of each metric for each sample."""
    metrics = {"recall": recall, "ndcg": ndcg}
    return {f"{name}@{k}": metric(ranks_U, k) for name, metric in metrics.items() for k in CUTOFFS}


def _means(values: Mapping[str, Float64], users_U: NDArray[np.int64]) -> Metrics:
    bounds = bootstrap_intervals(np.stack([*values.values()], axis=1), users_U).round(5).tolist()
    return Metrics(
        users=int(users_U.size),
        means={name: round(float(values_U.mean()), 5) for name, values_U in values.items()},
        intervals={name: (low, high) for name, (low, high) in zip(values, bounds, strict=True)},
    )

"""Counts of what followed what in the training samples, from which transitions are estimated (`core.transitions`).

The counts by lag are whole numbers, and they add up over users. Each shard of an index counts its targets only. With a
half-life, samples count by their weights (`core.decay`), which add up, too.

Shapes: I items, V targets of a shard, P pairs of an item and a target, L lags, H interactions, N samples.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from l2d_ray.core.arrays import Amounts, Float64, IntArray, Integers
from l2d_ray.core.decay import NO_DAY, days_of, weights
from l2d_ray.core.transitions import PLACES, Transitions


class Interactions(Protocol):
    """Training interactions of some users, one user after the other."""

    @property
    def items(self) -> NDArray[np.int32]:
        """[H] item indices, each user's in time order."""
        ...

    @property
    def timestamps(self) -> IntArray:
        """[H] times of the interactions, read with a half-life only."""
        ...

    @property
    def positions(self) -> IntArray:
        """[H] number of the user's items before each interaction."""
        ...

    @property
    def is_target(self) -> NDArray[np.bool_]:
        """[H] whether the interaction is the target of a training sample."""
        ...


@dataclass(frozen=True)
class TransitionCounts:
    """Numbers of training samples of some targets, by an item at most `PLACES` before, and by the lag.

    With a half-life, they are sums of weights on the newest day.
    """

    targets_V: IntArray
    """Item index of each target, ascending."""
    starts_I: IntArray
    """[I + 1]: the pairs of item i are those from starts[i] to starts[i + 1] - 1."""
    places_P: NDArray[np.int32]
    """Place of each pair's target in `targets_V`, ascending for each item."""
    counts_LP: Amounts
    """Samples of each pair, by lag."""
    totals_LI: Amounts
    """Samples after each item, by lag, of all targets of all shards."""
    samples_V: Amounts
    """Samples of each target."""
    samples: float
    """Samples of all targets of all shards."""
    half_life_days: float | None = None
    newest_day: int | None = None
    """Day of the newest sample, which weighs 1; None without a half-life."""

    @property
    def num_items(self) -> int:
        """Number of items that a target may follow."""
        return self.starts_I.size - 1

    @property
    def items_P(self) -> IntArray:
        """The item of each pair."""
        return np.repeat(np.arange(self.num_items), np.diff(self.starts_I))

    @classmethod
    def count(
        cls, parts: Iterable[Interactions], num_items: int, targets_V: IntArray, half_life_days: float | None = None
    ) -> "TransitionCounts":
        """Count the pairs of an item and one of these targets later in the same history."""
        newest_day, number = NO_DAY, np.float64 if half_life_days else np.int64
        if half_life_days:
            parts = list(parts)
            newest_day = max((int(_target_days(part).max(initial=NO_DAY)) for part in parts), default=NO_DAY)
        place_I = np.full(num_items, -1, np.int64)
        place_I[targets_V] = np.arange(targets_V.size)
        totals_LI, samples_I = np.zeros((PLACES, num_items), number), np.zeros(num_items, number)
        codes, amounts = [np.empty(0, np.int64)], list[Amounts]()  # of pair and lag
        for part in parts:
            targets_N = np.flatnonzero(part.is_target)
            positions_N, amounts_N = part.positions[targets_N], np.ones(targets_N.size, number)
            if half_life_days:
                amounts_N = weights(_target_days(part), newest_day, half_life_days)
            np.add.at(samples_I, part.items[targets_N], amounts_N)
            for lag in range(1, PLACES + 1):
                is_later_N = positions_N >= lag
                later_N, later_amounts_N = targets_N[is_later_N], amounts_N[is_later_N]
                items_N, places_N = part.items[later_N - lag].astype(np.int64), place_I[part.items[later_N]]
                np.add.at(totals_LI[lag - 1], items_N, later_amounts_N)
                pairs_N = (items_N * targets_V.size + places_N)[places_N >= 0]
                codes.append(pairs_N * PLACES + lag - 1)
                if half_life_days:
                    amounts.append(later_amounts_N[places_N >= 0])
        codes_N, counts_N = _sum_by_code(np.concatenate(codes), amounts)
        pairs_P, pair_N = np.unique(codes_N // PLACES, return_inverse=True)
        counts_LP = np.zeros((PLACES, pairs_P.size), _smallest_type(counts_N))
        counts_LP[codes_N % PLACES, pair_N] = counts_N
        return cls(
            targets_V,
            np.searchsorted(pairs_P, np.arange(num_items + 1) * targets_V.size),
            (pairs_P % max(targets_V.size, 1)).astype(np.int32),
            counts_LP,
            totals_LI,
            samples_I[targets_V],
            samples_I.sum().item(),
            half_life_days,
            newest_day if half_life_days else None,
        )

    def plus(self, older: "TransitionCounts") -> "TransitionCounts":
        """Return these counts and those of an older dataset, which may lack the last items and targets.

        Both have the same half-life, or none.
        """
        newest_day = None
        if self.newest_day is not None and older.newest_day is not None:
            newest_day = max(self.newest_day, older.newest_day)
        width, counted = max(self.targets_V.size, 1), [part._on_day(newest_day) for part in (older, self)]
        codes = [part.items_P * width + part.places_P for part in counted]
        pairs_P = np.union1d(*codes)
        largest = sum(part.counts_LP.max(initial=0).astype(np.int64) for part in counted)
        number = np.float32 if self.half_life_days else np.min_scalar_type(largest)
        counts_LP = np.zeros((PLACES, pairs_P.size), number)
        for part, codes_P in zip(counted, codes, strict=True):
            counts_LP[:, np.searchsorted(pairs_P, codes_P)] += part.counts_LP
        before, after = counted
        totals_LI, samples_V = after.totals_LI.copy(), after.samples_V.copy()
        totals_LI[:, : before.num_items] += before.totals_LI
        samples_V[: before.targets_V.size] += before.samples_V
        return TransitionCounts(
            self.targets_V,
            np.searchsorted(pairs_P, np.arange(self.num_items + 1) * width),
            (pairs_P % width).astype(np.int32),
            counts_LP.astype(_smallest_type(counts_LP)),
            totals_LI,
            samples_V,
            before.samples + after.samples,
            self.half_life_days,
            newest_day,
        )

    def _on_day(self, day: int | None) -> "TransitionCounts":
        """Return the counts with the weights that they have on a day, if they are weights."""
        if self.half_life_days is None or self.newest_day is None or day is None:
            return self
        factor = weights(self.newest_day, day, self.half_life_days)
        return replace(
            self,
            counts_LP=(factor * self.counts_LP).astype(np.float32),
            totals_LI=factor * self.totals_LI,
            samples_V=factor * self.samples_V,
            samples=factor * self.samples,
            newest_day=day,
        )

    @classmethod
    def join(cls, shards: "Sequence[TransitionCounts]", items: Integers) -> "TransitionCounts":
        """Return the counts of the targets of all shards, with the pairs of these items only."""
        wanted_I = np.zeros(shards[0].num_items, np.bool_)
        wanted_I[items] = True
        targets_V = np.sort(np.concatenate([shard.targets_V for shard in shards]))
        parts = []
        for shard in shards:
            items_P = shard.items_P
            kept_P = wanted_I[items_P]
            places_P = np.searchsorted(targets_V, shard.targets_V)[shard.places_P[kept_P]]
            parts.append((items_P[kept_P], places_P, shard.counts_LP[:, kept_P]))
        items_P, places_P, counts_LP = (np.concatenate(arrays, axis=-1) for arrays in zip(*parts, strict=True))
        order_P = np.lexsort((places_P, items_P))
        starts_I = np.searchsorted(items_P[order_P], np.arange(wanted_I.size + 1))
        samples_V = np.empty(targets_V.size, shards[0].samples_V.dtype)
        for shard in shards:
            samples_V[np.searchsorted(targets_V, shard.targets_V)] = shard.samples_V
        return cls(
            targets_V,
            starts_I,
            places_P[order_P].astype(np.int32),
            counts_LP[:, order_P],
            shards[0].totals_LI,
            samples_V,
            shards[0].samples,
        )

    def weigh(self, lag_decay: float, floor: float = 0.0) -> "Transitions":
        """Return the transitions with weight `lag_decay` (B) for each further place.

        `floor` is added to the number of training samples of every item, so that p(v) is above 0.
        """
        shape = self.num_items, self.targets_V.size
        counts_P = _weighted_sum(self.counts_LP, lag_decay)
        samples = self.samples + floor * self.num_items
        popularity_V = (self.samples_V.astype(np.float64) + floor) / (samples or 1)
        return Transitions(
            sparse.csr_array((counts_P, self.places_P, self.starts_I), shape),
            _weighted_sum(self.totals_LI, lag_decay),
            popularity_V,
        )


def _target_days(part: Interactions) -> IntArray:
    """Return the day [N] of each target."""
    return days_of(part.timestamps)[part.is_target]


def _sum_by_code(codes: IntArray, amounts: Sequence[Amounts]) -> tuple[IntArray, Amounts]:
    """Return each code once, ascending, and the sum of its amounts; without amounts, how often it occurs."""
    if not amounts:
        return np.unique(codes, return_counts=True)
    codes_N, code_N = np.unique(codes, return_inverse=True)
    return codes_N, np.bincount(code_N, np.concatenate(amounts), minlength=codes_N.size).astype(np.float32)


def _smallest_type(counts: NDArray[Any]) -> np.dtype[Any]:
    """Return the smallest type of these counts; weights keep theirs."""
    return counts.dtype if counts.dtype.kind == "f" else np.min_scalar_type(counts.max(initial=0))


def _weighted_sum(counts_LN: Integers | NDArray[np.floating], decay: float) -> Float64:
    """Return the sum over lags, lag after lag, so that an element does not depend on the others."""
    sums_N = np.zeros(counts_LN.shape[1])
    for lag, counts_N in enumerate(counts_LN):
        sums_N += decay**lag * counts_N
    return sums_N

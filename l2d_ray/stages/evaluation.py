"""Any recommender on any samples: ranks of the targets, and what they amount to.

Metrics are over the full catalogue, without sampled negatives, one target a sample. A target is *cold* if no training
sample has it; the others are *dense* or *sparse*, parted at the median number of training samples over the targets.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from l2d_ray.config import Config
from l2d_ray.core.arrays import FloatArray
from l2d_ray.core.metrics import IntArray, bootstrap_intervals, ndcg, recall, target_ranks
from l2d_ray.core.samples import in_fraction, sample_ids
from l2d_ray.core.space import SpaceKind
from l2d_ray.data.dataset import Dataset
from l2d_ray.encoding import HistoryEncoder, language_model
from l2d_ray.errors import InputError
from l2d_ray.index.sharding import ShardedIndex
from l2d_ray.recommenders.co_occurrence import CoOccurrence
from l2d_ray.recommenders.constrained_beam import ConstrainedBeam
from l2d_ray.recommenders.contract import Filters, Recommender
from l2d_ray.recommenders.grounded_beam import GroundedBeam
from l2d_ray.recommenders.l2d import L2DRecommender
from l2d_ray.recommenders.most_popular import MostPopular
from l2d_ray.schema import Split
from l2d_ray.workspace import Workspace

CUTOFFS = (20, 50, 100)
GROUPS = ("dense", "sparse", "cold")
SPACES = get_args(SpaceKind)
GENERATING = ("constrained-beam", "grounded-beam")
"""Kinds of recommender that write text, which takes seconds a sample."""


@dataclass(frozen=True)
class Contender:
    """A recommender to evaluate; plain values, so that a worker can make it."""

    name: str
    kind: str
    """most-popular, co-occurrence, l2d-global, l2d-local, constrained-beam or grounded-beam."""
    index: str = ""
    """L2D: path of the index's manifest in the workspace."""
    top_m: int = 0
    """L2D-L: rows that are averaged."""
    prior: float = 0.0
    """L2D-G: weight of log-frequency."""
    beams: int = 0
    """Constrained beam search."""
    fraction: float = 1.0
    """L2D: share of the memory that the index holds, for the report."""

    @property
    def generates(self) -> bool:
        """Whether it writes text."""
        return self.kind in GENERATING


@dataclass(frozen=True)
class Outcome:
    """What one contender did on a batch of U samples."""

    ranks_U: IntArray
    seconds: float
    """For the whole batch, encoding included."""
    tokens: int
    """Tokens that went through the model for the batch."""


class Stand:
    """Makes contenders and runs them. Models and indexes are loaded once, when they are first needed."""

    def __init__(self, config: Config, writes: bool) -> None:
        """Nothing is loaded yet. `writes`: some contender will, so that the model is loaded with its head."""
        self._config, self._workspace, self._writes = config, Workspace.open(config.workspace), writes
        self._dataset = Dataset.open(self._workspace)
        self._made: dict[Contender, Recommender] = {}
        self._indexes: dict[tuple[str, float], ShardedIndex] = {}
        self._filters = Filters(exclude_seen=config.recommend.exclude_seen)

    def run(
        self, contenders: Sequence[Contender], histories: Sequence[NDArray[np.int32]], targets_U: NDArray[np.int32]
    ) -> list[Outcome]:
        """Each contender on the same samples. Histories are encoded once for all L2D, and the time charged to each."""
        encoded: tuple[FloatArray, int, float] | None = None
        outcomes = []
        for contender in contenders:
            recommender, tokens, seconds = self._recommender(contender), 0, 0.0
            if isinstance(recommender, L2DRecommender):
                if encoded is None:
                    started = time.perf_counter()
                    states = self._encoder.encode(histories)
                    encoded = states.states_UD, states.tokens, time.perf_counter() - started
                states_UD, tokens, seconds = encoded
                started = time.perf_counter()
                items_UK, _ = recommender.decode(states_UD, histories, max(CUTOFFS), self._filters)
            else:
                started = time.perf_counter()
                writer = recommender.search if isinstance(recommender, ConstrainedBeam | GroundedBeam) else None
                before = writer.tokens if writer else 0
                items_UK, _ = recommender.recommend(histories, max(CUTOFFS), self._filters)
                tokens = writer.tokens - before if writer else 0
            seconds += time.perf_counter() - started
            outcomes.append(Outcome(target_ranks(items_UK, targets_U), seconds, tokens))
        return outcomes

    def _recommender(self, contender: Contender) -> Recommender:
        if contender not in self._made:
            self._made[contender] = self._make(contender)
        return self._made[contender]

    def _make(self, contender: Contender) -> Recommender:
        batch_size = self._config.evaluate.generation_batch_size
        if contender.kind == "most-popular":
            return MostPopular.fit(self._training[1])
        if contender.kind == "co-occurrence":
            return CoOccurrence.fit(*self._training)
        if contender.kind == "constrained-beam":
            model, num_items = self._language_model, len(self._titles)
            return ConstrainedBeam.over(model, self._encoder, num_items, contender.beams, batch_size)
        if contender.kind == "grounded-beam":
            return GroundedBeam.over(self._language_model, self._encoder, len(self._titles), batch_size)
        return L2DRecommender(
            lambda histories: self._encoder.encode(histories).states_UD,
            self._index(contender.index, contender.prior),
            "global" if contender.kind == "l2d-global" else "local",
            contender.top_m,
        )

    def _index(self, path: str, prior: float) -> ShardedIndex:
        if (path, prior) not in self._indexes:
            index = self._index(path, 0).with_prior(prior) if prior else ShardedIndex.open(self._workspace, path)
            self._indexes[path, prior] = index
        return self._indexes[path, prior]

    @cached_property
    def _training(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        return training_pairs(self._dataset)

    @cached_property
    def _language_model(self) -> Any:
        return language_model(self._config)

    @cached_property
    def _titles(self) -> list[str]:
        titles: list[str] = self._dataset.items()["title"].to_pylist()
        return titles

    @cached_property
    def _encoder(self) -> HistoryEncoder:
        return HistoryEncoder(self._config, self._titles, self._language_model.backbone if self._writes else None)


@dataclass(frozen=True)
class Choice:
    """What was chosen for one space, and its index."""

    index: str
    """Path of the index's manifest in the workspace."""
    top_m: int
    prior: float
    """What `+prior` stands for."""


def contender(name: str, config: Config, choices: dict[str, Choice]) -> Contender:
    """The contender of a name in `evaluate.recommenders`; `choices` is by space. Raises InputError if it is unknown."""
    base, plus, suffix = name.partition("+")
    if name in ("most-popular", "co-occurrence", "grounded-beam"):
        return Contender(name, name)
    if base.startswith("constrained-beam-") and base.removeprefix("constrained-beam-").isdigit() and not plus:
        beams = int(base.removeprefix("constrained-beam-"))
        if beams > 1:
            return Contender(name, "constrained-beam", beams=beams)
    for kind in ("l2d-global", "l2d-local"):
        space = config.index.space if base == kind else base.partition(f"{kind}-")[2]
        if space in choices and (not plus or (suffix == "prior" and kind == "l2d-global")):
            choice = choices[space]
            prior = choice.prior if plus else config.index.prior_in(space)
            return Contender(name, kind, index=choice.index, top_m=choice.top_m, prior=prior)
    raise InputError(
        f"evaluate.recommenders={name!r}: unknown; known are most-popular, co-occurrence, l2d-global, l2d-local (both"
        " also with -none, -centre, -whiten-total or -whiten-within; l2d-global with +prior), constrained-beam-<beams,"
        " at least 2> and grounded-beam"
    )


def spaces_of(names: Sequence[str], config: Config) -> list[str]:
    """The spaces that recommenders of these names need indexes in; that of the configuration first, if any is L2D."""
    if not any(name.startswith("l2d") for name in names):
        return []
    named = (match[1] for name in names if (match := re.match(r"l2d-(?:global|local)-([^+]+)", name)))
    return list(dict.fromkeys([config.index.space, *(space for space in named if space in SPACES)]))


def training_pairs(dataset: Dataset) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The last item of the history and the target of every training sample."""
    lasts, targets = [np.empty(0, np.int32)], [np.empty(0, np.int32)]
    for users in dataset.iter_users():
        for items, splits in zip(users["item_indices"].to_pylist(), users["splits"].to_pylist(), strict=True):
            positions = np.flatnonzero(np.array(splits) == Split.TRAIN)
            lasts.append(np.array(items, np.int32)[positions - 1])
            targets.append(np.array(items, np.int32)[positions])
    return np.concatenate(lasts), np.concatenate(targets)


def samples_of(dataset: Dataset, split: Split, most: int) -> list[dict[str, Any]]:
    """At most so many samples of a split, chosen by sample id: `sample_id`, `user_hash`, `history` and `target`."""
    chosen: list[dict[str, Any]] = []
    share = min(1.0, 1.2 * (most + 20) / max(dataset.num_samples(split), 1))
    for users in dataset.iter_users():
        for user in users.to_pylist():
            positions = np.flatnonzero(np.array(user["splits"]) == split)
            ids = sample_ids(np.full(positions.size, user["user_hash"], np.int64), positions)
            kept = in_fraction(ids, share)
            for position, sample_id in zip(positions[kept], ids[kept], strict=True):
                items = user["item_indices"]
                chosen.append(
                    {
                        "sample_id": int(sample_id),
                        "user_hash": user["user_hash"],
                        "history": items[:position],
                        "target": items[position],
                    }
                )
    return sorted(chosen, key=lambda sample: sample["sample_id"] % 2**64)[:most]


def groups_of(targets_U: NDArray[np.integer], training_targets: NDArray[np.integer]) -> NDArray[np.str_]:
    """[U] `cold`, `sparse` or `dense` for each target."""
    size = int(max(targets_U.max(initial=0), training_targets.max(initial=0))) + 1
    rows_U = np.bincount(training_targets, minlength=size)[targets_U]
    middle = np.median(rows_U[rows_U > 0]) if (rows_U > 0).any() else 0
    return np.where(rows_U == 0, "cold", np.where(rows_U > middle, "dense", "sparse"))


def summarise(
    name: str, ranks_U: IntArray, users_U: IntArray, groups_U: NDArray[np.str_], seconds: float, tokens: float
) -> dict[str, Any]:
    """One row of the table: the metrics with their intervals and by group, and the cost of a sample.

    What the table calls a user is a sample: one history and what came next. Intervals keep a user's samples together.
    """
    return {
        "recommender": name,
        **_metrics(ranks_U, users_U),
        "seconds_per_user": round(seconds, 6),
        "tokens_per_user": round(tokens, 1),
        "groups": {group: _metrics(ranks_U[groups_U == group], users_U[groups_U == group]) for group in GROUPS},
    }


def _metrics(ranks_U: IntArray, users_U: IntArray) -> dict[str, Any]:
    """`recall@K`, `ndcg@K`, their `intervals`, and `users`: of how many samples they are the means."""
    if not ranks_U.size:
        return {"users": 0}
    metrics = {"recall": recall, "ndcg": ndcg}
    values = {f"{name}@{k}": metric(ranks_U, k) for name, metric in metrics.items() for k in CUTOFFS}
    bounds = bootstrap_intervals(np.stack([*values.values()], axis=1), users_U).round(5).tolist()
    means = {name: round(float(values_U.mean()), 5) for name, values_U in values.items()}
    return {**means, "users": int(ranks_U.size), "intervals": dict(zip(values, bounds, strict=True))}

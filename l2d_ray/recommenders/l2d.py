"""L2D: one forward pass for a history, then a search. Source: arXiv 2509.11524.

`l2d-global` and `l2d-local` score by distances, as in the paper. `l2d` adds what followed the last items, and scores by
probability: it is the aggregation `posterior` (`core.posterior`), whose parameters are fitted with the index.
"""

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self, get_args

import numpy as np

from l2d_ray.config import Config
from l2d_ray.core.arrays import Float64
from l2d_ray.core.query import Query
from l2d_ray.core.space import SpaceKind
from l2d_ray.index.aggregations import AGGREGATIONS, l2d_posterior
from l2d_ray.index.sharding import ShardedIndex
from l2d_ray.recommenders.contract import (
    Choices,
    Declaration,
    IndexKey,
    Need,
    Options,
    Outcome,
    SharingRecommender,
    Study,
)

if TYPE_CHECKING:  # PyTorch takes seconds to import and is not needed to check a name
    from l2d_ray.encoding import Encoded, History
    from l2d_ray.recommenders.resources import Resources


@dataclass(frozen=True)
class L2DRecommender(SharingRecommender):
    """One aggregation of L2D over an index, whatever aggregation a query names.

    Scores are 1 / distance, of `posterior` log-probabilities. With a prior, the distance of L2D-G includes the item's
    log-frequency.
    """

    encode: "Callable[[Sequence[History]], Encoded]"
    """Returns the hidden states of histories, from the model that made the rows of the index."""
    index: ShardedIndex
    aggregation: str = "global"
    top_m: int = 200
    """M, for an aggregation that reads it."""

    @classmethod
    def run_all(cls, recommenders: Sequence[Self], queries: Sequence[Query]) -> list[Outcome]:
        """Run several recommenders that share a model.

        The histories are encoded once, and each recommender is charged for all of it. Recommenders that differ in M
        only share a search and are charged equal parts of it.
        """
        started = time.perf_counter()
        encoded = recommenders[0].encode([query.history for query in queries])
        encoding = time.perf_counter() - started
        keys = [(id(one.index), one.aggregation) for one in recommenders]
        outcomes: dict[tuple[int, str, int], Outcome] = {}
        for key in dict.fromkeys(keys):
            group = [one for one, key_of_one in zip(recommenders, keys, strict=True) if key_of_one == key]
            top_ms = list(dict.fromkeys(one.top_m for one in group))
            started = time.perf_counter()
            results = group[0].index.recommend_at(encoded.states_UD, queries, top_ms, group[0].aggregation)
            seconds = encoding + (time.perf_counter() - started) / len(top_ms)
            for top_m, lists in zip(top_ms, results, strict=True):
                outcomes[(*key, top_m)] = Outcome(lists, seconds, encoded.tokens)
        return [outcomes[(*key, one.top_m)] for key, one in zip(keys, recommenders, strict=True)]


@dataclass(frozen=True)
class L2DOptions(Options):
    """Options of L2D."""

    aggregation: str
    space: str
    """Space of the index (`index.space`)."""
    top_m: int
    """M, for an aggregation that reads it."""
    prior: float
    """Weight of an item's log-frequency in L2D-G (`index.prior`)."""
    best_prior: bool = False
    """Whether validation chooses the prior: `+prior` in the name."""
    plain: bool = False
    """Whether the name is that of the aggregation alone."""
    fraction: float = 1.0
    """Share of the memory in the index."""

    @classmethod
    def read(cls, config: Config, groups: Mapping[str, str]) -> Self:
        """Return the options of a name. Without a space it means `index.space`, without `+prior` `index.prior`.

        `l2d` alone means the aggregation `posterior`.
        """
        space = groups.get("space", config.index.space)
        return cls(
            groups.get("aggregation", l2d_posterior.NAME),
            space,
            config.recommend.top_m,
            config.index.prior_in(space),
            best_prior="best_prior" in groups,
            plain=groups.keys() == {"aggregation"},
        )

    @property
    def indexes(self) -> list[IndexKey]:
        """The index of this space."""
        return [IndexKey(self.space, self.fraction)]

    @property
    def log_probabilities(self) -> bool:
        """Whether it is the aggregation `posterior`."""
        return self.aggregation == l2d_posterior.NAME

    @property
    def fitted(self) -> list[IndexKey]:
        """The same index, for the aggregation `posterior`."""
        return self.indexes if self.log_probabilities else []

    def studies(self, config: Config) -> list[Study]:
        """Return a study of every aggregation with an option to tune, in `index.space` and in this space.

        There is none for an aggregation without such an option.
        """
        if self.aggregation not in _TUNED:
            return []
        spaces = dict.fromkeys([config.index.space, self.space])
        return [_study(aggregation, space, config) for space in spaces for aggregation in _REPORTED]

    def chosen(self, choices: Choices) -> Self:
        """Return the options with the M, or for `+prior` with the prior, that validation chose in this space."""
        option = _TUNED.get(self.aggregation)
        if option is None or (option == "prior" and not self.best_prior):
            return self
        return self.having(option, choices[self.space][_label(self.aggregation)])

    def at_fraction(self, fraction: float) -> Self | None:
        """Return the options with a share of the memory, if the name is that of the aggregation alone."""
        return replace(self, fraction=fraction) if self.plain else None

    def having(self, option: str, value: float) -> Self:
        """Return the options with another M (`top_m`) or another prior."""
        return replace(self, top_m=int(value)) if option == "top_m" else replace(self, prior=value)


def _study(aggregation: str, space: str, config: Config) -> Study:
    option, prior = _TUNED[aggregation], config.index.prior_in(space)
    values: list[float] = sorted(set(config.evaluate.priors))
    if option == "top_m":
        values = sorted(set(config.evaluate.top_m), reverse=True)
    options = L2DOptions(aggregation, space, top_m=0, prior=prior)
    return Study(
        group=space,
        label=_label(aggregation),
        recommender=f"l2d-{aggregation}-{space}",
        option=option,
        trials=tuple(options.having(option, value) for value in values),
        default=config.recommend.top_m if option == "top_m" else prior,
    )


def _label(aggregation: str) -> str:
    """Return the option that is chosen for an aggregation, with its name unless it is the first with this option."""
    option = _TUNED[aggregation]
    first = next(name for name, other in _TUNED.items() if option == other)
    return option if aggregation == first else f"{option} of {aggregation}"


def _make(options: L2DOptions, resources: "Resources") -> L2DRecommender:
    (key,) = options.indexes
    index = resources.index(key, options.prior)
    return L2DRecommender(resources.encoder.encode, index, options.aggregation, options.top_m)


def _log_scores(options: L2DOptions, scores: Float64) -> Float64:
    """Return -1/2 distance^2 of scores 1 / distance, which is a log-likelihood in `whiten-within`."""
    if options.log_probabilities:
        return scores
    logs: Float64 = -0.5 / np.square(scores)
    return logs


def _any_of(names: Iterable[str]) -> str:
    return "|".join(map(re.escape, names))


_SPACES = get_args(SpaceKind)
_TUNED = {name: option for name, module in AGGREGATIONS.items() if (option := module.TUNED_OPTION)}
_REPORTED = sorted(_TUNED, key=_TUNED.__getitem__, reverse=True)
"""The aggregations with an option to tune, in the order of the report: those that have an M first."""
_WITHOUT_PRIOR = [name for name, aggregation in AGGREGATIONS.items() if aggregation.TUNED_OPTION != "prior"]

DECLARATION = Declaration(
    pattern=(
        rf"(?!l2d-({_any_of(_WITHOUT_PRIOR)})\b.*\+)"
        rf"l2d(-(?P<aggregation>{_any_of(AGGREGATIONS)})(-(?P<space>{_any_of(_SPACES)}))?(?P<best_prior>\+prior)?)?"
    ),
    form=(
        f"l2d, or l2d-<{' or '.join(AGGREGATIONS)}>[-<{', '.join(_SPACES)}>][+prior], +prior not with"
        f" {' or '.join(_WITHOUT_PRIOR)}"
    ),
    examples=("l2d", *(f"l2d-{name}" for name in AGGREGATIONS)),
    options=L2DOptions,
    make=_make,
    needs=frozenset({Need.INDEX, Need.ENCODER}),
    log_scores=_log_scores,
)

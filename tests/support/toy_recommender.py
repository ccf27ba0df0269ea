"""A recommender as a reader of the contract would write one: it always ranks the items of one parity first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from l2d_ray.config import Config
from l2d_ray.core.decoding import ScoredItems, best_items
from l2d_ray.core.query import Query
from l2d_ray.recommenders.contract import Choices, Declaration, Options, Recommender, Study


@dataclass(frozen=True)
class Toy(Recommender):
    num_items: int
    parity: float

    def recommend(self, queries: Sequence[Query]) -> list[ScoredItems]:
        items_I = np.arange(self.num_items)
        everything = ScoredItems(items_I, np.where(items_I % 2 == self.parity, 1.0, 0.0))
        return [best_items([everything.permitted(query.exclude, query.allow)], query.k) for query in queries]


@dataclass(frozen=True)
class ToyOptions(Options):
    parity: float

    @classmethod
    def read(cls, config: Config, groups: Mapping[str, str]) -> Self:
        return cls(parity=int(groups.get("parity", 0)))

    def studies(self, config: Config) -> list[Study]:
        trials = (ToyOptions(0), ToyOptions(1))
        return [Study("toy", "parity", "toy", "parity", trials, default=0)]

    def chosen(self, choices: Choices) -> Self:
        return type(self)(choices["toy"]["parity"])


DECLARATION = Declaration(
    pattern=r"toy(-(?P<parity>[01]))?",
    form="toy[-<0 or 1>]",
    examples=("toy", "toy-1"),
    options=ToyOptions,
    make=lambda options, resources: Toy(len(resources.titles), options.parity),
    needs=frozenset(),
)

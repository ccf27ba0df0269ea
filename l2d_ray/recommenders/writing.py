"""Recommenders that write text. The text costs the time, so recommenders with the same writer share it.

The values of a study differ in what they make of the text. So a study writes every text once.
"""

import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

from l2d_ray.core.decoding import ScoredItems
from l2d_ray.core.query import Query
from l2d_ray.recommenders.contract import Outcome, SharingRecommender

WrittenT = TypeVar("WrittenT")


class Writer(Protocol[WrittenT]):
    """The part of a recommender that runs the language model."""

    def write(self, queries: Sequence[Query]) -> tuple[list[WrittenT], int]:
        """Return the result of each query, and the number of tokens that went through the language model."""


@dataclass(frozen=True)
class WritingRecommender(SharingRecommender, Generic[WrittenT]):
    """A recommender that ranks the items by the result of a writer."""

    writer: Writer[WrittenT]

    @abstractmethod
    def rank(self, written: WrittenT, query: Query) -> ScoredItems:
        """Return the recommendations for one query, given the writer's result."""

    @classmethod
    def run_all(cls, recommenders: Sequence[Self], queries: Sequence[Query]) -> list[Outcome]:
        """Run several recommenders. Each writer runs once, and each recommender is charged for all of it."""
        written: dict[int, tuple[list[WrittenT], int, float]] = {}
        outcomes = []
        for one in recommenders:
            if id(one.writer) not in written:
                started = time.perf_counter()
                written[id(one.writer)] = (*one.writer.write(queries), time.perf_counter() - started)
            results, tokens, seconds = written[id(one.writer)]
            started = time.perf_counter()
            lists = [one.rank(result, query) for result, query in zip(results, queries, strict=True)]
            outcomes.append(Outcome(lists, seconds + time.perf_counter() - started, tokens))
        return outcomes

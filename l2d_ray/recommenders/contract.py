"""The interface of a recommender, and the declaration by which evaluation, configuration and tests know it.

A recommender is one module of this package. It defines a `Recommender`, and describes it by a `Declaration` named
`DECLARATION`. `registry.MODULES` lists the modules.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Generic, NamedTuple, Self, TypeVar

import numpy as np

from l2d_ray.config import Config
from l2d_ray.core.arrays import Float64, FloatArray
from l2d_ray.core.decoding import ScoredItems, best_of_all
from l2d_ray.core.query import History, Query

if TYPE_CHECKING:  # imports PyTorch, which takes seconds and is not needed to check a name
    from l2d_ray.data.dataset import Dataset
    from l2d_ray.data.samples import Sample
    from l2d_ray.recommenders.registry import NamedRecommender
    from l2d_ray.recommenders.resources import Resources
    from l2d_ray.recommenders.training import Trainer


DENSE_BATCH = 256
"""Histories whose scores are computed together, which limits the memory for the scores of all items."""


@dataclass(frozen=True)
class Outcome:
    """Recommendations for a batch of queries, and their cost."""

    lists: list[ScoredItems]
    """One list for each query."""
    seconds: float
    tokens: int
    """Tokens that went through the language model."""


class Recommender(ABC):
    """Recommends items after histories. L2D and everything that it is compared with have this interface."""

    @abstractmethod
    def recommend(self, queries: Sequence[Query]) -> list[ScoredItems]:
        """Return for each query at most `query.k` items that it permits, best first.

        No item is in a list twice, and scores never rise along a list.
        """

    def recommend_counted(self, queries: Sequence[Query]) -> tuple[list[ScoredItems], int]:
        """Return `recommend`, and the number of tokens that went through the language model for it.

        A recommender that runs the language model overrides this.
        """
        return self.recommend(queries), 0

    @classmethod
    def run_all(cls, recommenders: Sequence[Self], queries: Sequence[Query]) -> list[Outcome]:
        """Run several recommenders of this class on the same queries, and measure each.

        A class whose recommenders can share work overrides this.
        """
        outcomes = []
        for recommender in recommenders:
            started = time.perf_counter()
            lists, tokens = recommender.recommend_counted(queries)
            outcomes.append(Outcome(lists, time.perf_counter() - started, tokens))
        return outcomes


class SharingRecommender(Recommender):
    """A recommender whose work is in `run_all`, because several of its class share a part of it."""

    def recommend(self, queries: Sequence[Query]) -> list[ScoredItems]:
        """Return the permitted items of the best scores."""
        return self.recommend_counted(queries)[0]

    def recommend_counted(self, queries: Sequence[Query]) -> tuple[list[ScoredItems], int]:
        """Recommend, and count tokens."""
        (outcome,) = self.run_all([self], queries)
        return outcome.lists, outcome.tokens

    @classmethod
    @abstractmethod
    def run_all(cls, recommenders: Sequence[Self], queries: Sequence[Query]) -> list[Outcome]:
        """Run several recommenders of this class on the same queries, and measure each."""


class DenseRecommender(Recommender):
    """A recommender that scores the whole catalogue after a history, for many histories at once."""

    @abstractmethod
    def scores(self, histories: Sequence[History]) -> FloatArray:
        """Return the score [U, I] of every item after each history; -inf takes an item out."""

    def recommend(self, queries: Sequence[Query]) -> list[ScoredItems]:
        """Return the permitted items of the best scores."""
        lists: list[ScoredItems] = []
        for start in range(0, len(queries), DENSE_BATCH):
            batch = queries[start : start + DENSE_BATCH]
            scores_UI = self.scores([query.history for query in batch])
            lists += [
                best_of_all(scores_I, query.k, query.exclude, query.allow)
                for scores_I, query in zip(scores_UI, batch, strict=True)
            ]
        return lists


class Need(Enum):
    """A resource that a recommender is made from; `Resources` has one property or method for each."""

    TRAINING_INTERACTIONS = "training_interactions"
    INDEX = "index"
    ENCODER = "encoder"
    """The language model without its head."""
    TITLE_STATES = "title_states_ID"
    """The language model's hidden states of the titles. It does not run when a query comes."""
    TRAINABLE_MODEL = "trainable_model"
    """A separate copy of the language model. The recommender has trained some of its weights."""
    LANGUAGE_MODEL = "language_model"
    """The language model with its head."""
    TRAINED = "trained"
    """The weights that jobs/train.py left."""


MODEL_NEEDS = frozenset({Need.ENCODER, Need.LANGUAGE_MODEL, Need.TITLE_STATES, Need.TRAINABLE_MODEL})
"""Needs of a recommender that runs the language model, at each query or when it is made."""


class IndexKey(NamedTuple):
    """An index of the workspace's memory."""

    space: str
    """Value of `index.space`."""
    fraction: float = 1.0
    """Share of the rows that `index.sample_fraction` leaves."""


Choices = Mapping[str, Mapping[str, float]]
"""Choices of the validation: a value for each study, by its group and its label."""


@dataclass(frozen=True)
class Options:
    """Options of a recommender, read from its name. A recommender without options uses this class itself."""

    @classmethod
    def read(cls, config: Config, groups: Mapping[str, str]) -> Self:
        """Return the options of a name, given the named groups of `Declaration.pattern` that it has."""
        return cls()

    @property
    def indexes(self) -> Sequence[IndexKey]:
        """The indexes that the recommender searches."""
        return ()

    @property
    def fitted(self) -> Sequence[IndexKey]:
        """Those of them for which the parameters of the aggregation `posterior` must be fitted."""
        return ()

    def check(self, dataset: "Dataset", test: "Sequence[Sample]") -> None:
        """Raise InputError if the options do not fit the dataset, or if what the recommender needs is missing.

        An evaluation calls this before it begins. May log a warning about what a reader must know.
        """
        return

    def check_model(self, config: Config, dataset: "Dataset") -> None:
        """Raise InputError if it was trained with another language model than that of `config`.

        An evaluation calls this before it begins, and an endpoint before it starts.
        """
        return

    def studies(self, config: Config) -> "Sequence[Study]":
        """Return what must be compared on validation samples before the recommender is tested."""
        return ()

    def chosen(self, choices: Choices) -> Self:
        """Return the same options with the values that validation chose."""
        return self

    @property
    def parts(self) -> "Sequence[NamedRecommender]":
        """The recommenders that it combines, if it is a fusion."""
        return ()

    @property
    def log_probabilities(self) -> bool:
        """Whether scores are natural logarithms of probabilities, which add up to 1 over the catalogue."""
        return False

    def at_fraction(self, fraction: float) -> Self | None:
        """Return the same options with a share of the memory. None leaves this recommender out of that comparison."""
        return None


@dataclass(frozen=True)
class Study:
    """Values of one option, to compare on validation samples.

    The value with the best Recall@20 is chosen; of equally good values, the smallest. A single value is chosen without
    a run.
    """

    group: str
    """Section of the report that states the choice."""
    label: str
    """Name of the choice in the report, unique in its group."""
    recommender: str
    """Name of the recommender in the report's rows."""
    option: str
    """The field in which the trials differ."""
    trials: tuple[Options, ...]
    """The recommender's options, one for each value."""
    default: float
    """The choice among several values where there are no validation samples."""

    @property
    def compared(self) -> tuple[Options, ...]:
        """The trials to run: none if there is one value only."""
        return self.trials if len(self.trials) > 1 else ()

    @property
    def untested(self) -> float:
        """The choice without a run."""
        only: float = getattr(self.trials[0], self.option) if len(self.trials) == 1 else self.default
        return only


OptionsT = TypeVar("OptionsT", bound=Options)


def logits(_: Options, scores: Float64) -> Float64:
    """Return scores that grow like log-probabilities as they are (`Declaration.log_scores`)."""
    return scores


def logarithms(_: Options, scores: Float64) -> Float64:
    """Return the logarithms of scores that grow like probabilities (`Declaration.log_scores`)."""
    logs: Float64 = np.log(scores)
    return logs


@dataclass(frozen=True)
class Declaration(Generic[OptionsT]):
    """Description of a recommender by its own module."""

    pattern: str
    """Regular expression of its names. Named groups hold options."""
    form: str
    """The pattern as an error message shows it."""
    examples: tuple[str, ...]
    """Names that match. The contract test runs each of them."""
    options: type[OptionsT]
    make: "Callable[[OptionsT, Resources], Recommender]"
    """Make the recommender. Only the resources listed in `needs` are there."""
    needs: frozenset[Need]
    writes_text: bool = False
    """Whether it generates text, which takes seconds per query."""
    samples_only: bool = False
    """Whether it has lists for the samples of an evaluation only."""
    trainer: "Trainer | None" = None
    """Its part in jobs/train.py; None if it needs no training."""
    log_scores: "Callable[[OptionsT, Float64], Float64] | None" = None
    """Returns its scores as log-probabilities, up to a factor and a constant. None keeps it out of fusions."""

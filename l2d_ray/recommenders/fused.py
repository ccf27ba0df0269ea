"""Fusion: one probability from the scores of several recommenders, with weights that are fitted on validation samples.

`fused` combines l2d with sasrec, `fused:transitions+sasrec` the named ones. `core.fusion` has the formula. Any
recommender that scores the catalogue can be a part, whatever its scores are (`Declaration.log_scores`). An item that a
part does not list gets the least score of the part's list.

The weights belong to the dataset, to the weights of trained parts and to the indexes of L2D. jobs/evaluate.py fits them
(`stages.fusion`). Validation chooses nothing else: the number of a part, as in `ease-250`, is in its name, or it is the
default.

Shapes: U queries, I items, K parts.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from l2d_ray.config import Config
from l2d_ray.core.arrays import IntArray
from l2d_ray.core.decoding import best_of_all
from l2d_ray.core.fusion import FusionWeights, Pairs
from l2d_ray.core.query import History, Query, known_items
from l2d_ray.errors import InputError
from l2d_ray.recommenders.contract import Declaration, IndexKey, Options, Outcome, Recommender, SharingRecommender
from l2d_ray.recommenders.registry import NamedRecommender, find
from l2d_ray.records import Record

if TYPE_CHECKING:
    from l2d_ray.data.dataset import Dataset
    from l2d_ray.data.samples import Sample
    from l2d_ray.recommenders.resources import Resources

NAME = "fused"
DEFAULT = "l2d+sasrec"
FOLDER = "fusions"
NO_ITEMS = np.empty(0, np.int64)


class FusionRecord(Record):
    """The weights of a fusion."""

    parts: dict[str, float]
    """Weight of each part, by its name."""
    log_repeat: float
    """Logarithm of the factor for items of the history."""
    samples: int
    """Validation samples that the weights were fitted on; 0 if they are the same for all."""
    nats: float | None
    """Mean of -log p(target | history) over these samples; None without samples."""
    seconds: float
    """Seconds of the fit, with the scores of the parts that no fit before it had."""

    @property
    def weights(self) -> FusionWeights:
        """The weights, in the order of the parts."""
        return FusionWeights(tuple(self.parts.values()), self.log_repeat)


@dataclass(frozen=True)
class FusedOptions(Options):
    """The recommenders that a fusion combines."""

    combined: tuple[NamedRecommender, ...]

    @classmethod
    def read(cls, config: Config, groups: Mapping[str, str]) -> Self:
        """Return the recommenders in the name. Raises InputError for one that is unknown or has no scores."""
        names = groups.get("parts", DEFAULT).split("+")
        combined = tuple(find(name, config, NAME) for name in dict.fromkeys(names))
        for part in combined:
            if part.declaration.log_scores is None:
                raise InputError(f"{NAME}={part.name!r}: has no scores of the whole catalogue; leave it out")
        return cls(combined)

    @property
    def parts(self) -> Sequence[NamedRecommender]:
        """The recommenders that it combines."""
        return self.combined

    @property
    def log_probabilities(self) -> bool:
        """True: scores are log-probabilities."""
        return True

    @property
    def indexes(self) -> Sequence[IndexKey]:
        """The indexes that the parts search."""
        return list(dict.fromkeys(key for part in self.combined for key in part.options.indexes))

    @property
    def fitted(self) -> Sequence[IndexKey]:
        """Those of them for which the parameters of the aggregation `posterior` must be fitted."""
        return list(dict.fromkeys(key for part in self.combined for key in part.options.fitted))

    def check(self, dataset: "Dataset", test: "Sequence[Sample]") -> None:
        """Raise InputError if a part cannot be made, or was trained on the samples that the weights are fitted on."""
        for part in self.combined:
            part.options.check(dataset, test)
            if part.trained_on_valid(dataset):
                raise InputError(f"{NAME}={part.name!r}: was trained with train.on_valid=true; leave it out")

    def check_model(self, config: Config, dataset: "Dataset") -> None:
        """Raise InputError if a part was trained with another language model than that of `config`."""
        for part in self.combined:
            part.options.check_model(config, dataset)


def record_path(options: Options, dataset: "Dataset", indexes: Mapping[IndexKey, str]) -> str:
    """Return the path of the record of a fusion, which has a digest of all that decides the weights.

    `indexes` has the path of each index's manifest. Raises InputError if a part was not trained on this dataset.
    """
    parts = [
        [part.name, repr(part.options), part.checksum(dataset), [indexes[key] for key in part.options.indexes]]
        for part in options.parts
    ]
    digest = hashlib.sha256(json.dumps([dataset.digest, parts]).encode()).hexdigest()
    return f"{FOLDER}/{digest[:16]}.json"


def read_fusion(options: Options, dataset: "Dataset", indexes: Mapping[IndexKey, str]) -> FusionRecord:
    """Return the weights of a fusion. Raises InputError if they were not fitted to its parts as they are now."""
    path = record_path(options, dataset, indexes)
    if not dataset.workspace.exists(path):
        name = f"{NAME}:{'+'.join(part.name for part in options.parts)}"
        raise InputError(
            f"{dataset.workspace.path(path)}: not found, so {name} has no weights for its parts as they are;"
            f" run jobs/evaluate.py evaluate.recommenders={name} first"
        )
    return FusionRecord.read(dataset.workspace, path)


@dataclass(frozen=True)
class Part:
    """A part of a fusion, as a source of log-probabilities, up to a factor and a constant."""

    named: NamedRecommender
    recommender: Recommender
    num_items: int

    def run(self, queries: Sequence[Query]) -> tuple[NDArray[np.float32], int]:
        """Return x [U, I] after each history, whatever the queries permit, and count tokens."""
        open_queries = [replace(query, k=self.num_items, exclude=NO_ITEMS, allow=None) for query in queries]
        lists, tokens = self.recommender.recommend_counted(open_queries)
        log_scores: Any = self.named.declaration.log_scores
        logs_UI = np.zeros((len(lists), self.num_items), np.float32)
        for logs_I, found in zip(logs_UI, lists, strict=True):
            if len(found):
                listed = log_scores(self.named.options, found.scores_I)
                logs_I[:] = listed.min()
                logs_I[found.items_I] = listed
        return logs_UI, tokens


def parts_of(options: Options, resources: "Resources") -> list[Part]:
    """Make the parts of a fusion. Fusions that are made from the same resources share them."""
    num_items = len(resources.titles)
    return [Part(part, resources.recommender(part), num_items) for part in options.parts]


def seen_pairs(histories: Sequence[History], num_items: int) -> Pairs:
    """Return each history and each known item of it, once."""
    seen = [np.unique(known_items(history, num_items)) for history in histories]
    rows: IntArray = np.repeat(np.arange(len(seen)), np.array([items.size for items in seen], np.int64))
    return rows, np.concatenate([NO_ITEMS, *seen])


@dataclass(frozen=True)
class Fused(SharingRecommender):
    """Scores are natural logarithms of probabilities, which add up to 1 over the catalogue."""

    parts: Sequence[Part]
    weights: FusionWeights

    @classmethod
    def run_all(cls, recommenders: Sequence[Self], queries: Sequence[Query]) -> list[Outcome]:
        """Run several fusions. A part that several have runs once, and each is charged for all of it."""
        ran: dict[int, tuple[NDArray[np.float32], int, float]] = {}
        outcomes = []
        for one in recommenders:
            for part in one.parts:
                if id(part.recommender) not in ran:
                    started = time.perf_counter()
                    ran[id(part.recommender)] = (*part.run(queries), time.perf_counter() - started)
            started = time.perf_counter()
            logs, tokens, seconds = zip(*(ran[id(part.recommender)] for part in one.parts), strict=True)
            seen = seen_pairs([query.history for query in queries], one.parts[0].num_items)
            scores_UI = one.weights.log_probabilities(np.stack(logs), seen)
            lists = [
                best_of_all(scores_I, query.k, query.exclude, query.allow)
                for scores_I, query in zip(scores_UI, queries, strict=True)
            ]
            outcomes.append(Outcome(lists, sum(seconds) + time.perf_counter() - started, sum(tokens)))
        return outcomes


def _make(options: FusedOptions, resources: "Resources") -> Fused:
    return Fused(parts_of(options, resources), read_fusion(options, resources.dataset, resources.indexes).weights)


DECLARATION = Declaration(
    pattern=rf"{NAME}(:(?P<parts>[^+]+(\+[^+]+)+))?",
    form=f"{NAME}, or {NAME}:<recommender>+<recommender>",
    examples=(NAME, f"{NAME}:transitions+most-popular", f"{NAME}:l2d+ease"),
    options=FusedOptions,
    make=_make,
    needs=frozenset(),
)

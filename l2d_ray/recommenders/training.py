"""Recommenders that are trained: their data, the interface of a learner, and the epochs of a training.

A recommender that is trained gives its `Declaration` a `Trainer`. `fit` runs the epochs of any learner;
`stages/training.py` keeps checkpoints of it in the workspace.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from l2d_ray.config import Config, TrainConfig
from l2d_ray.core.arrays import Float64, IntArray
from l2d_ray.core.metrics import ndcg, target_ranks
from l2d_ray.core.query import Query
from l2d_ray.data.dataset import Dataset
from l2d_ray.data.samples import Sample, training_interactions
from l2d_ray.errors import InputError
from l2d_ray.recommenders.contract import Declaration, Need, Options, Recommender, logits
from l2d_ray.recommenders.trained import Epoch, read_record, record_of
from l2d_ray.schema import Split

if TYPE_CHECKING:  # it takes seconds, and most processes read records of trainings only
    from torch import Tensor

    from l2d_ray.recommenders.resources import Resources

CUTOFF = 20
"""K of the NDCG that chooses the best epoch."""


@dataclass(frozen=True)
class TrainingData:
    """The training sequences of all users: the items up to their last training sample, and nothing after it."""

    items: NDArray[np.int32]
    """The sequences in flat form, one user after the other."""
    offsets: IntArray
    """The sequence of user u is `items[offsets[u] : offsets[u + 1]]`; it has at least two items."""
    num_items: int
    """Number of items in the catalogue."""

    @classmethod
    def read(cls, dataset: Dataset, on_valid: bool = False) -> "TrainingData":
        """Read a dataset. With `on_valid`, validation samples are training samples, too.

        Raises InputError if it has one item, no training sample, or a strange item.
        """
        where, num_items = dataset.workspace.path("dataset"), len(dataset.items())
        if num_items < 2:
            raise InputError(f"{where}: has {num_items} item, so that there is nothing to rank; prepare more data")
        found = training_interactions(dataset, (Split.TRAIN, Split.VALID) if on_valid else Split.TRAIN)
        lengths = np.diff(found.offsets)
        items, lengths = found.items[np.repeat(lengths > 1, lengths)], lengths[lengths > 1]
        if not items.size:
            raise InputError(f"{where}: has 0 training samples; prepare more data")
        if not 0 <= items.min() <= items.max() < num_items:
            raise InputError(
                f"{where}: a history has an item that is not among the {num_items} items; run jobs/prepare_data.py"
                " again"
            )
        return cls(items, np.cumsum([0, *lengths]), num_items)

    @property
    def samples(self) -> int:
        """Number of training samples: every item of a sequence but the first is the target of one."""
        return self.items.size - self.offsets.size + 1

    @property
    def popularity_I(self) -> Float64:
        """Share of each item among the items of all sequences."""
        shares_I: Float64 = np.bincount(self.items, minlength=self.num_items) / self.items.size
        return shares_I


class Learner(ABC):
    """A recommender during its training."""

    @abstractmethod
    def run_epoch(self, epoch: int) -> float:
        """Train on every sample once and return the mean loss of a sample.

        The result depends on the state, the seed and the number of the epoch alone, so that a training which is
        resumed ends with the same weights. Returns a number that is not finite as soon as a loss is not.
        """

    @abstractmethod
    def recommender(self) -> Recommender:
        """Return the recommender with the present weights."""

    @abstractmethod
    def weights(self) -> "dict[str, Tensor]":
        """Return a copy, on the CPU, of what the recommender is made from."""

    @abstractmethod
    def state(self) -> "dict[str, Tensor]":
        """Return a copy, on the CPU, of what the training goes on from."""

    @abstractmethod
    def restore(self, state: "Mapping[str, Tensor]") -> None:
        """Take over a `state`."""


@dataclass(frozen=True)
class Trainer:
    """A recommender's part in jobs/train.py."""

    learner: Callable[[Config, TrainingData], Learner]
    """Make a learner for the settings and the data."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `train` whose defaults are not the section's, by name."""
    unused: frozenset[str] = frozenset()
    """Settings of `train` that it has no use for."""
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Values of settings of `train` that jobs/tune.py compares, by name."""
    reads_titles: bool = False
    """Whether the weights depend on the language model's states of the titles."""
    reads_memory: bool = False
    """Whether the weights depend on the rows of the memory's snapshot."""
    settings: tuple[str, ...] = ()
    """Settings of other sections that decide the weights, by dotted key."""


@dataclass(frozen=True)
class TrainedOptions(Options):
    """The name of a trained recommender, which is that of its folder."""

    name: str

    @classmethod
    def read(cls, config: Config, groups: Mapping[str, str]) -> Self:
        """Return the whole name."""
        return cls(groups["name"])

    def check(self, dataset: Dataset, test: Sequence[Sample]) -> None:
        """Raise InputError if it was not trained, or on another dataset."""
        read_record(dataset, self.name)


class ModelOptions(TrainedOptions):
    """The name of a trained recommender for which the language model runs when a query comes."""

    @staticmethod
    @abstractmethod
    def identity(config: Config) -> dict[str, Any]:
        """Return what decides the model's output, as the recorded settings have it."""

    def check_model(self, config: Config, dataset: Dataset) -> None:
        """Raise InputError, naming what differs, if it was trained with another language model."""
        location = dataset.workspace.path(record_of(self.name))
        read_record(dataset, self.name).check_model(self.identity(config), location)


def declare_trained(
    name: str,
    make: "Callable[[TrainedOptions, Resources], Recommender]",
    trainer: Trainer,
    options: type[TrainedOptions] = TrainedOptions,
    needs: Iterable[Need] = (),
) -> Declaration[TrainedOptions]:
    """Return the declaration of a recommender that is made from its weights, and from what else it `needs`."""
    return Declaration(
        pattern=rf"(?P<name>{name}(-\w[\w.-]*)?)",
        form=f"{name}[-<name of another training>]",
        examples=(name,),
        options=options,
        make=make,
        needs=frozenset({Need.TRAINED, *needs}),
        trainer=trainer,
        log_scores=logits,
    )


@dataclass
class Progress:
    """A training so far."""

    history: list[Epoch] = field(default_factory=list)
    best: "dict[str, Tensor]" = field(default_factory=dict)
    """Weights of the best epoch."""
    keep_last: bool = False
    """Whether the last epoch counts as the best one. Validation samples that are trained on cannot choose an epoch."""

    @property
    def best_epoch(self) -> int:
        """Number of the best epoch, from 1; of equally good ones, the first. 0 before the first."""
        if self.keep_last:
            return len(self.history)
        return max(self.history, key=lambda epoch: epoch.ndcg).epoch if self.history else 0

    def ended(self, settings: TrainConfig) -> bool:
        """Return whether no further epoch is due."""
        return len(self.history) >= settings.epochs or len(self.history) - self.best_epoch >= settings.patience


def fit(
    learner: Learner,
    settings: TrainConfig,
    validate: Callable[[Recommender], float],
    progress: Progress,
    save: Callable[[], None],
) -> None:
    """Run the epochs that are due. After each one, extend `progress` and call `save`.

    Raises InputError if the loss or a weight is not finite.
    """
    while not progress.ended(settings):
        number, started = len(progress.history) + 1, time.monotonic()
        loss = learner.run_epoch(number)
        weights = learner.weights()
        if not math.isfinite(loss) or not all(weight.isfinite().all() for weight in weights.values()):
            raise InputError(
                f"train.learning_rate={settings.learning_rate:g}: the loss is not finite in epoch {number}; lower it"
            )
        value = validate(learner.recommender())
        seconds = round(time.monotonic() - started, 3)
        progress.history.append(Epoch(epoch=number, loss=loss, ndcg=value, seconds=seconds))
        if progress.best_epoch == number:
            progress.best = weights
        save()


def mean_ndcg(recommender: Recommender, samples: Sequence[Sample], exclude_seen: bool) -> float:
    """Return NDCG@20 of a recommender on samples, over the full catalogue."""
    lists = recommender.recommend([Query.after(sample.history, CUTOFF, exclude_seen) for sample in samples])
    ranks = target_ranks([found.items_I for found in lists], np.array([sample.target for sample in samples]))
    return float(ndcg(ranks, CUTOFF).mean())

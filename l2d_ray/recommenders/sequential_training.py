"""Training of neural models of sequences: windows, losses, the learner, and the declaration of such a recommender.

A training sequence of n items gives n - 1 samples, one at each place but the last: the next item is the target.
A sequence of more samples than `train.length` is cut into windows, at other places in each epoch, and each sample is in
one window. SASRec's paper trains on the last samples only, which are 40% of MovieLens-100k with windows of 50.

Shapes: B sequences of at most L items, N samples, I items, D dimension, K negatives.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from l2d_ray.config import Config, TrainConfig
from l2d_ray.core.arrays import IntArray
from l2d_ray.recommenders.contract import Declaration, Recommender
from l2d_ray.recommenders.gradient_learner import GradientLearner
from l2d_ray.recommenders.sequential import SequenceModel, SequenceRecommender
from l2d_ray.recommenders.training import TrainedOptions, Trainer, TrainingData, declare_trained

if TYPE_CHECKING:  # imports transformers, which takes seconds
    from l2d_ray.recommenders.resources import Resources

BETAS = (0.9, 0.98)
"""Adam's decay rates in the code of SASRec's authors."""

Build = Callable[[TrainConfig, int], SequenceModel]
"""Makes a model for the settings and a number of items."""


def sample_losses(model: SequenceModel, states_BLD: Tensor, targets_BL: Tensor, settings: TrainConfig) -> Tensor:
    """Return the loss [N] of each sample; `targets_BL` is `num_items` where there is none.

    The negatives are drawn uniformly, once for all places of a sequence. One that is the target itself does not count.
    """
    is_sample_BL = targets_BL < model.num_items
    targets_N = targets_BL[is_sample_BL]
    if settings.loss == "softmax":
        logits_NI = states_BLD[is_sample_BL] @ model.items.weight[: model.num_items].T
        return functional.cross_entropy(logits_NI, targets_N, reduction="none")
    size = (len(targets_BL), settings.negatives)
    negatives_BK = torch.randint(model.num_items, size, device=targets_BL.device)
    logits_BLK = states_BLD @ model.items(negatives_BK).transpose(1, 2)
    hits_BLK = negatives_BK[:, None] == targets_BL[:, :, None]
    negative_NK = logits_BLK.masked_fill(hits_BLK, -torch.inf)[is_sample_BL]
    positive_N = (states_BLD[is_sample_BL] * model.items(targets_N)).sum(dim=1)
    if settings.loss == "sampled-softmax":
        logits_N1K = torch.cat([positive_N[:, None], negative_NK], dim=1)
        return functional.cross_entropy(logits_N1K, torch.zeros_like(targets_N), reduction="none")
    return functional.softplus(-positive_N) + functional.softplus(negative_NK).mean(dim=1)


@dataclass(frozen=True)
class Windows:
    """Windows of training sequences. The items of one are its places, and all but the first are targets."""

    data: TrainingData
    starts: IntArray
    """Places of the first items of the windows in `data.items`."""
    stops: IntArray
    """Places behind their last targets. Neighbouring windows share an item: the last target of one begins the next."""

    @classmethod
    def cut(cls, data: TrainingData, length: int, random: np.random.Generator) -> Self:
        """Cut sequences into windows of at most `length` samples. Sequences of more are cut at random places."""
        begins, ends = data.offsets[:-1], data.offsets[1:]
        samples = ends - begins - 1
        beyond = np.where(samples > length, random.integers(length, size=samples.size), 0)
        counts = -(-(samples + beyond) // length)
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        stops = np.repeat(ends + beyond, counts) - number * length
        starts = np.maximum(np.repeat(begins, counts), stops - length - 1)
        return cls(data, starts, np.minimum(np.repeat(ends, counts), stops))

    def lengths(self, rows: IntArray) -> IntArray:
        """Return the number of samples of windows."""
        return self.stops[rows] - self.starts[rows] - 1

    def batch(self, rows: IntArray) -> tuple[NDArray[np.int64], NDArray[np.int64], IntArray]:
        """Return items [B, L] and targets [B, L] of windows, filled up with `num_items`, and their lengths [B]."""
        lengths = self.lengths(rows)
        places = np.arange(lengths.max())
        at = np.minimum(self.starts[rows, None] + places, self.data.items.size - 2)
        filled = places >= lengths[:, None]
        items, targets = (np.where(filled, self.data.num_items, self.data.items[at + shift]) for shift in (0, 1))
        return items.astype(np.int64), targets.astype(np.int64), lengths


class SequenceLearner(GradientLearner):
    """A model of sequences during its training."""

    _model: SequenceModel

    def __init__(self, build: Build, settings: TrainConfig, data: TrainingData, device: str) -> None:
        super().__init__(settings, data, device)
        with self._seeded(0):
            self._model = build(settings, data.num_items)
            self._model.initialise()
        self._model.popularity.copy_(torch.from_numpy(data.popularity_I))
        self._model.to(self._device)
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=settings.learning_rate, betas=BETAS, weight_decay=settings.weight_decay
        )

    def _losses(self, epoch: int) -> Iterator[Tensor]:
        random = np.random.default_rng([self._settings.seed, epoch])
        windows = Windows.cut(self._data, self._settings.length, random)
        order = random.permutation(windows.starts.size)
        for start in range(0, order.size, self._settings.batch_size):
            parts = self._parts(windows, order[start : start + self._settings.batch_size])
            yield torch.cat([self._losses_of(*windows.batch(part)) for part in parts])

    def _parts(self, windows: Windows, rows: IntArray) -> list[IntArray]:
        """Divide a batch by length, so that on a CPU fewer than half of a part's places are filled up.

        A window of Amazon Beauty has 6 samples and the longest of a batch 50: one part would compute 8 times as much.
        """
        if self._device.type == "cuda":  # where more parts cost more than the places
            return [rows]
        exponents = np.ceil(np.log2(windows.lengths(rows)))
        return [rows[exponents == exponent] for exponent in np.unique(exponents)]

    def _losses_of(self, *arrays: NDArray[np.int64]) -> Tensor:
        items_BL, targets_BL, lengths_B = (torch.from_numpy(array).to(self._device) for array in arrays)
        return sample_losses(self._model, self._model(items_BL, lengths_B), targets_BL, self._settings)

    def recommender(self) -> Recommender:
        """Return the recommender with the present weights, until the next epoch changes them."""
        return SequenceRecommender(self._model.eval())


def declare(
    name: str,
    build: Build,
    defaults: Mapping[str, Any] | None = None,
    unused: Sequence[str] = (),
    grid: Mapping[str, Sequence[Any]] | None = None,
) -> Declaration[TrainedOptions]:
    """Return the declaration of a model of sequences. The arguments behind `build` are those of `Trainer`."""

    def learner(config: Config, data: TrainingData) -> SequenceLearner:
        return SequenceLearner(build, config.train, data, config.device)

    trainer = Trainer(learner, defaults or {}, frozenset({"temperature", *unused}), grid or {})
    return declare_trained(name, partial(_make, build), trainer)


def _make(build: Build, options: TrainedOptions, resources: "Resources") -> SequenceRecommender:
    trained = resources.trained(options.name)
    model = build(trained.record.train, trained.record.items)
    try:
        model.load_state_dict(trained.weights)
    except RuntimeError:
        raise trained.unsuitable() from None
    return SequenceRecommender(model.to(resources.config.device).eval())

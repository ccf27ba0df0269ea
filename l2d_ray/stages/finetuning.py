"""Fine-tuning without Ray: the training samples, their order, their tokens, and the record of a training.

The samples of a user whose windows start at the same item form a *group*, of up to `history.stride` samples. A group
stays together, so that a batch is a forest of few trees, which is how tree-packed training saves tokens. Each epoch
shuffles the groups. Batch sizes count samples, so that a learning rate means the same as in other programs.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l2d_ray.config import Config
from l2d_ray.core.arrays import IntArray
from l2d_ray.core.packing import Prompts, TrainingSamples
from l2d_ray.data.dataset import Dataset
from l2d_ray.data.samples import iter_samples
from l2d_ray.errors import InputError
from l2d_ray.prompts import PromptEncoder
from l2d_ray.records import Record
from l2d_ray.schema import Split

RUNNING_ONLY = {"checkpoint_steps", "checkpoint_minutes", "keep_checkpoints", "max_failures", "trackers", "name"}
"""Settings of `finetune` that do not change the trained weights."""


class Training(Record):
    """The content of `training.json`, which is written last: settings, counts and losses of a training."""

    run: str
    """Digest of everything that decides the weights (`run_digest`)."""
    settings: dict[str, Any]
    """Sections `model`, `history`, `prompt` and `finetune` of the configuration."""
    samples: int
    """Samples trained on; a sample counts once an epoch."""
    distinct_tokens: int
    """Tokens that ran through the model."""
    tokens_one_by_one: int
    """Tokens that would have run if each sample had run alone."""
    epochs: int
    best_epoch: int
    """Number, from 1, of the epoch after which these weights were saved."""
    train_loss: float
    """Mean cross-entropy of a title's token during the best epoch."""
    valid_loss: float
    """Mean cross-entropy of a title's token on the validation samples after the best epoch."""
    seconds: float
    """Seconds spent training, over all attempts."""
    losses: list[dict[str, float]]
    """One entry an epoch: `epoch`, `step` (at its end), `train_loss`, `valid_loss`."""
    curve: list[dict[str, float]]
    """About 200 points of the training: `step`, `loss`, `distinct_tokens`."""


@dataclass
class Progress:
    """State of a run, saved in every checkpoint."""

    step: int = 0
    """Finished optimizer steps."""
    samples: int = 0
    distinct_tokens: int = 0
    tokens_one_by_one: int = 0
    seconds: float = 0.0
    epoch_loss: float = 0.0
    """Sum of the losses of this epoch's samples so far."""
    epoch_samples: int = 0
    best_epoch: int = 0
    """Number of the best epoch, from 1; 0 before the first finite validation loss."""
    losses: list[dict[str, float]] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)

    def count_step(self, samples: int, distinct_tokens: int, one_by_one: int, loss_sum: float, every: int) -> None:
        """Count a finished optimizer step; add a point to the curve at each `every`-th step."""
        self.step += 1
        self.samples += samples
        self.distinct_tokens += distinct_tokens
        self.tokens_one_by_one += one_by_one
        self.epoch_loss += loss_sum
        self.epoch_samples += samples
        if self.step % every == 0:
            point = {"step": self.step, "loss": loss_sum / samples, "distinct_tokens": self.distinct_tokens}
            self.curve.append(point)

    def end_epoch(self, valid_loss: float) -> bool:
        """Record the losses of an epoch and return whether it is the best so far."""
        train_loss, epoch = self.epoch_loss / self.epoch_samples, len(self.losses) + 1
        best = valid_loss < (self.losses[self.best_epoch - 1]["valid_loss"] if self.best_epoch else math.inf)
        losses = {"train_loss": round(train_loss, 6), "valid_loss": round(valid_loss, 6)}
        self.losses.append({"epoch": epoch, "step": self.step, **losses})
        self.epoch_loss, self.epoch_samples = 0.0, 0
        if best:
            self.best_epoch = epoch
        return best


@dataclass(frozen=True)
class SampleTable:
    """All samples of one split as integers: N samples, and the parts of histories that they see."""

    items: NDArray[np.int32]
    """Items of the windows and their targets, each interaction once, one user after the other."""
    starts: IntArray
    """[N] where the window of each sample starts in `items`."""
    stops: IntArray
    """[N] where the window stops: the place of the target in `items`."""
    ids: IntArray
    """[N] sample ids."""

    @classmethod
    def read(cls, dataset: Dataset, split: Split, config: Config, limit: int | None) -> "SampleTable":
        """Read about `limit` samples of a split, or all, with the windows of `config.history`.

        Groups are chosen whole, by a hash, because a part of a group costs nearly as many tokens as the whole. The
        table takes 24 bytes a sample and 4 bytes an item. Raises InputError for an item that the catalogue lacks.
        """
        share = 1.0 if limit is None else min(1.0, limit / max(dataset.num_samples(split), 1))
        items, starts, stops, ids = [np.empty(0, np.int32)], *([np.empty(0, np.int64)] for _ in range(3))
        total = 0
        for batch in iter_samples(dataset, split):
            samples = batch.in_fraction(config.history, share)
            first, size = samples.window_starts(config.history), samples.items.size + 1
            # An item is seen by a sample if more windows have started than stopped at its place.
            changes = np.bincount(first, minlength=size) - np.bincount(samples.stops + 1, minlength=size)
            seen = np.cumsum(changes)[:-1] > 0
            places = total + np.cumsum(seen) - 1
            items.append(samples.items[seen])
            starts.append(places[first])
            stops.append(places[samples.stops])
            ids.append(samples.sample_ids)
            total += items[-1].size
        table = cls(np.concatenate(items), np.concatenate(starts), np.concatenate(stops), np.concatenate(ids))
        num_items = len(dataset.items())
        if table.items.size and not 0 <= table.items.min() <= table.items.max() < num_items:
            raise InputError(
                f"{dataset.workspace.path('dataset')}: a history has an item that is not among the {num_items} items;"
                " run jobs/prepare_data.py again"
            )
        return table

    def __len__(self) -> int:
        return self.ids.size

    def epoch(self, seed: int, epoch: int) -> IntArray:
        """Return [N] the samples in the order of an epoch: groups shuffled, each group in time order."""
        groups, group_N = np.unique(self.starts, return_inverse=True)
        place = np.random.default_rng([seed, epoch]).permutation(groups.size)
        return np.lexsort([self.stops, place[group_N]])

    def split(self, samples_N: IntArray, parts: int) -> list[IntArray]:
        """Divide samples into parts of similar size, none empty, where windows change.

        The beginning of a window runs once for every part that has samples of it. So a part may have up to two thirds
        more or fewer samples than the mean if no window is then divided.
        """
        size = samples_N.size // parts
        even_P = np.linspace(0, samples_N.size, parts + 1)[1:-1].round().astype(int)
        changes = np.flatnonzero(np.diff(self.starts[samples_N])) + 1
        if not changes.size:
            return np.split(samples_N, even_P)
        after_P = np.searchsorted(changes, even_P).clip(max=changes.size - 1)
        near_2P = changes[np.array([np.maximum(after_P - 1, 0), after_P])]
        near_P = near_2P[np.abs(near_2P - even_P).argmin(axis=0), np.arange(parts - 1)]
        return np.split(samples_N, np.where(np.abs(near_P - even_P) <= size // 3, near_P, even_P))

    def titles(self, samples_N: IntArray) -> int:
        """Return the number of titles that run through the model for these samples, in the order of an epoch."""
        starts_N, items_N = self.starts[samples_N], self.stops[samples_N] - self.starts[samples_N]
        longest = np.append(np.diff(starts_N) != 0, True)  # the last sample of a window has all items of the others
        return int(items_N[longest].sum()) + samples_N.size


@dataclass(frozen=True)
class Schedule:
    """Division of the samples into epochs, optimizer steps, workers and micro-batches.

    The parts of a whole have similar sizes (`SampleTable.split`).
    """

    samples: int
    epochs: int
    workers: int
    batch_size: int
    """Mean number of samples of a step, at most."""
    micro_batch_size: int
    """Mean number of samples of a micro-batch, at most."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps of `batch_size` samples in the mean, each with at least one sample for every worker."""
        return min(-(-self.samples // self.batch_size), self.samples // self.workers)

    @property
    def steps(self) -> int:
        """Number of steps of all epochs."""
        return self.epochs * self.steps_per_epoch

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches of each worker in each step."""
        largest, smallest = -(-self.samples // self.steps_per_epoch), self.samples // self.steps_per_epoch
        return min(-(-largest // (self.workers * self.micro_batch_size)), smallest // self.workers)

    def divide(self, table: SampleTable, seed: int) -> Iterator[list[list[IntArray]]]:
        """Yield for each step the micro-batches of each worker: row numbers of `table`, each row once an epoch.

        The micro-batches of a step cost about the same, because a step lasts as long as its busiest worker. The samples
        of a step do not depend on how many workers share its micro-batches.
        """
        shape = self.steps_per_epoch, self.micro_batches, self.workers
        for epoch in range(self.epochs):
            parts = table.split(table.epoch(seed, epoch), math.prod(shape))
            costs = [table.titles(part) for part in parts]
            by_cost = np.argsort(costs, kind="stable").reshape(self.steps_per_epoch, -1)
            for step in np.random.default_rng([seed, epoch, 1]).permutation(by_cost).reshape(shape):
                yield [[parts[part] for part in of_worker] for of_worker in step.T]


class SamplePhraser:
    """Converter of samples into token sequences for training."""

    def __init__(self, prompts: PromptEncoder, context_length: int) -> None:
        """Take the model's `context_length`; a window with more tokens loses its oldest items."""
        self._prompts, self._longest = prompts, context_length

    @classmethod
    def of_model(cls, config: Config, titles: list[str]) -> "SamplePhraser":
        """Return a phraser for the model of `config`, without reading the model's weights."""
        # Ray's own processes import this module, and these take seconds.
        from l2d_ray.models.backbone import context_length, load_tokenizer, read_architecture
        from l2d_ray.models.checkpoint import find_model

        checkpoint = find_model(config.model)
        prompts = PromptEncoder(config.prompt, load_tokenizer(checkpoint), titles)
        return cls(prompts, context_length(read_architecture(checkpoint, config.model)))

    def vocabulary(self) -> NDArray[np.int32]:
        """Return the token ids that titles of the catalogue use, sorted."""
        return self._prompts.vocabulary()

    def phrase(self, table: SampleTable, samples: IntArray) -> TrainingSamples:
        """Return prompt and title of each of these samples (row numbers of the table)."""
        pairs = [self._pair(table.items, int(table.starts[n]), int(table.stops[n])) for n in samples]
        sequences = Prompts.join([np.concatenate(pair) for pair in pairs])
        return TrainingSamples(sequences, np.array([title.size for _, title in pairs]), table.ids[samples])

    def batches(self, table: SampleTable, samples: IntArray, size: int) -> list[TrainingSamples]:
        """Return these samples in batches of at most `size` in the mean (`SampleTable.split`)."""
        return [self.phrase(table, part) for part in table.split(samples, -(-samples.size // size))]

    def _pair(self, items: NDArray[np.int32], start: int, stop: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        title = self._prompts.item_tokens(int(items[stop]))
        while True:
            window = items[start:stop]
            (prompt,) = self._prompts.encode(window, np.zeros(1, np.int64), np.array([window.size]))
            if prompt.size + title.size <= self._longest or start == stop:
                return prompt, title
            start += 1


def run_digest(config: Config, model: str, dataset: str) -> str:
    """Return a digest of everything that decides the final weights: settings, model and dataset."""
    text = json.dumps([deciding_settings(config), model, dataset], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def deciding_settings(config: Config) -> dict[str, Any]:
    """Return the settings that decide the weights, without the model's name, for which its digest stands."""
    settings = settings_of(config)
    settings["finetune"] = {key: value for key, value in settings["finetune"].items() if key not in RUNNING_ONLY}
    del settings["model"]["name"]
    return settings


def learning_rate_factor(step: int, warmup: int, steps: int) -> float:
    """Return the share of the learning rate at a step, from 0: a line from 1 / `warmup` to 1, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def tuned(config: Config, location: str) -> Config:
    """Return the configuration with the result of fine-tuning, at `location`, as its model."""
    key = "adapter" if config.finetune.method == "lora" else "name"
    return config.replace({f"model.{key}": location})


def settings_of(config: Config) -> dict[str, Any]:
    """Return the sections of a configuration that fine-tuning reads."""
    return config.model_dump(mode="json", include={"model", "history", "prompt", "finetune"})

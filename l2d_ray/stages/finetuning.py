"""What fine-tuning learns from and in which order, and what it leaves: all of it without Ray.

Samples that share a window's beginning (a user's, up to `history.stride` of them) form a *group* and stay together, so
that a batch is a forest of few trees: that is where tree-packed training saves its tokens. Each epoch shuffles the
groups; batches are counted in samples, so that a learning rate means what it means elsewhere.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l2d_ray.config import Config
from l2d_ray.core.packing import Prompts, TrainingSamples
from l2d_ray.core.samples import IntArray
from l2d_ray.data.dataset import Dataset
from l2d_ray.data.samples import iter_samples
from l2d_ray.errors import InputError
from l2d_ray.prompts import PromptEncoder
from l2d_ray.records import Record
from l2d_ray.schema import Split

RUNNING_ONLY = {"checkpoint_steps", "checkpoint_minutes", "keep_checkpoints", "max_failures", "trackers", "name"}
"""Settings of `finetune` that do not change what is learned."""


class Training(Record):
    """`training.json`, written last: what was trained, and how it went."""

    run: str
    """Digest of everything that decides the result."""
    settings: dict[str, Any]
    """The configuration's model, history, prompt and finetune."""
    samples: int
    """Samples trained on, counted in every epoch."""
    distinct_tokens: int
    """Tokens that went through the model."""
    tokens_one_by_one: int
    """Tokens that would have, one sample at a time."""
    epochs: int
    best_epoch: int
    """The one whose weights these are, from 1."""
    train_loss: float
    """Mean cross-entropy of a title's token in the best epoch, as it was trained."""
    valid_loss: float
    """The same on validation samples after it."""
    seconds: float
    """Spent training, over all attempts."""
    losses: list[dict[str, float]]
    """By epoch: `epoch`, `step` (at its end), `train_loss`, `valid_loss`."""
    curve: list[dict[str, float]]
    """Along the way: `step`, `loss`, `distinct_tokens`."""


@dataclass
class Progress:
    """Where a run is; part of every checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    distinct_tokens: int = 0
    tokens_one_by_one: int = 0
    seconds: float = 0.0
    epoch_loss: float = 0.0
    """Sum over the samples of this epoch so far."""
    epoch_samples: int = 0
    best_epoch: int = 0
    """From 1; 0 before there is a finite validation loss."""
    losses: list[dict[str, float]] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)

    def end_epoch(self, valid_loss: float) -> bool:
        """Note an epoch's losses; whether it is the best so far."""
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
    """N samples of one split, and the histories they are of: integers only."""

    items: NDArray[np.int32]
    """What the windows and their targets cover of the histories, one user after the other."""
    starts: IntArray
    """[N] where each sample's window begins, in `items`."""
    stops: IntArray
    """[N] where it ends: the item that came next."""
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
            begins, size = samples.window_starts(config.history), samples.items.size + 1
            opened = np.bincount(begins, minlength=size) - np.bincount(samples.stops + 1, minlength=size)
            seen = np.cumsum(opened)[:-1] > 0
            places = total + np.cumsum(seen) - 1
            items.append(samples.items[seen])
            starts.append(places[begins])
            stops.append(places[samples.stops])
            ids.append(samples.sample_ids)
            total += items[-1].size
        table = cls(np.concatenate(items), np.concatenate(starts), np.concatenate(stops), np.concatenate(ids))
        num_items = len(dataset.items())
        if table.items.size and not 0 <= table.items.min() <= table.items.max() < num_items:
            raise InputError(
                f"{dataset.workspace.path('dataset')}: a history holds an item that is not among the {num_items} items;"
                " run jobs/prepare_data.py again"
            )
        return table

    def __len__(self) -> int:
        return self.ids.size

    def epoch(self, seed: int, epoch: int) -> IntArray:
        """[N] the samples in the order of an epoch: groups shuffled, each in time order."""
        groups, group_N = np.unique(self.starts, return_inverse=True)
        place = np.random.default_rng([seed, epoch]).permutation(groups.size)
        return np.lexsort([self.stops, place[group_N]])


@dataclass(frozen=True)
class Schedule:
    """How samples are dealt out: epochs, optimizer steps, workers, micro-batches. All but the last in equal parts."""

    samples: int
    epochs: int
    workers: int
    batch_size: int
    micro_batch_size: int
    """At most so many, or one more where the steps of an epoch differ by a sample."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps of at most `batch_size` samples, but one for each worker (of whom there are no more than samples)."""
        return min(-(-self.samples // self.batch_size), self.samples // self.workers)

    @property
    def steps(self) -> int:
        """Of all epochs."""
        return self.epochs * self.steps_per_epoch

    @property
    def micro_batches(self) -> int:
        """Of each worker in each step."""
        most, least = -(-self.samples // self.steps_per_epoch), self.samples // self.steps_per_epoch
        return min(-(-most // (self.workers * self.micro_batch_size)), least // self.workers)

    def deal(self, table: SampleTable, seed: int) -> Iterator[list[list[IntArray]]]:
        """For each step, for each worker its micro-batches: row numbers of `table`, every one once an epoch."""
        for epoch in range(self.epochs):
            for batch in np.array_split(table.epoch(seed, epoch), self.steps_per_epoch):
                parts = np.array_split(batch, self.workers * self.micro_batches)
                yield [parts[start :: self.workers] for start in range(self.workers)]


class SamplePhraser:
    """Turns samples of a table into what the model trains on."""

    def __init__(self, table: SampleTable, prompts: PromptEncoder, context_length: int) -> None:
        """`context_length` is the model's; a longer window loses its oldest items."""
        self._table, self._prompts, self._longest = table, prompts, context_length

    def phrase(self, samples: IntArray) -> TrainingSamples:
        """Prompt and title of each of these samples (row numbers of the table)."""
        pairs = [self._pair(int(self._table.starts[n]), int(self._table.stops[n])) for n in samples]
        sequences = Prompts.join([np.concatenate(pair) for pair in pairs])
        return TrainingSamples(sequences, np.array([title.size for _, title in pairs]), self._table.ids[samples])

    def _pair(self, start: int, stop: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        title = self._prompts.item_tokens(int(self._table.items[stop]))
        while True:
            window = self._table.items[start:stop]
            (prompt,) = self._prompts.encode(window, np.zeros(1, np.int64), np.array([window.size]))
            if prompt.size + title.size <= self._longest or start == stop:
                return prompt, title
            start += 1


def pack(step: int, micro_batches: list[TrainingSamples]) -> dict[str, Any]:
    """A row of the training data: one worker's part of one step."""
    return {
        "step": step,
        "tokens": np.concatenate([batch.sequences.tokens for batch in micro_batches]),
        "lengths": np.concatenate([batch.sequences.lengths for batch in micro_batches]),
        "target_lengths": np.concatenate([batch.target_lengths for batch in micro_batches]),
        "ids": np.concatenate([batch.ids for batch in micro_batches]),
    }


def unpack(row: dict[str, Any], micro_batches: int) -> list[TrainingSamples]:
    """The samples of a row of `pack` in so many micro-batches, as `Schedule.deal` cuts them."""
    offsets = np.concatenate([[0], np.cumsum(row["lengths"])])
    bounds = np.cumsum([0, *(part.size for part in np.array_split(row["ids"], micro_batches))])
    batches = []
    for start, stop in pairwise(bounds):
        own = slice(int(start), int(stop))
        tokens = row["tokens"][offsets[start] : offsets[stop]]
        sequences = Prompts(tokens, offsets[start : stop + 1] - offsets[start])
        batches.append(TrainingSamples(sequences, row["target_lengths"][own], row["ids"][own]))
    return batches


def run_digest(config: Config, model: str, dataset: str) -> str:
    """What decides the weights that a run ends with: the settings, and digests of the model and the dataset."""
    text = json.dumps([deciding_settings(config), model, dataset], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def deciding_settings(config: Config) -> dict[str, Any]:
    """Those of `settings_of` that decide what is learned, but for the model's name: its digest stands for it."""
    settings = settings_of(config)
    settings["finetune"] = {key: value for key, value in settings["finetune"].items() if key not in RUNNING_ONLY}
    del settings["model"]["name"]
    return settings


def learning_rate_factor(step: int, warmup: int, steps: int) -> float:
    """What a step of `steps`, from 0, has of the learning rate: a line from 1 / `warmup` up to 1, a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def tuned(config: Config, location: str) -> Config:
    """The configuration whose model is what fine-tuning left at `location`."""
    key = "adapter" if config.finetune.method == "lora" else "name"
    return config.replace({f"model.{key}": location})


def settings_of(config: Config) -> dict[str, Any]:
    """The parts of a configuration that fine-tuning reads."""
    return config.model_dump(mode="json", include={"model", "history", "prompt", "finetune"})

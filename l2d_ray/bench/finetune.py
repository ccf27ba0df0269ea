"""Benchmark of fine-tuning: tree-packed batches against padded batches, and two workers against one."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l2d_ray.bench.cores import on_cores_of_its_workers
from l2d_ray.config import Config
from l2d_ray.core.packing import Prompts, TrainingSamples, plan_forest
from l2d_ray.data.dataset import Dataset
from l2d_ray.distributed.training.checkpoints import run_folder
from l2d_ray.distributed.training.driver import check_layers, finetune, identify_run
from l2d_ray.distributed.workers import workers_that_fit
from l2d_ray.models.causal_loss import packed_loss, padded_loss
from l2d_ray.models.identity import resolve_dtype
from l2d_ray.models.trainable import load_trainable
from l2d_ray.schema import Split
from l2d_ray.stages.checks import check_training
from l2d_ray.stages.finetuning import SamplePhraser, SampleTable
from l2d_ray.timing import timed
from l2d_ray.workspace import Workspace

BATCH_SIZES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class FinetuneBenchmark:
    """Medians over alternating runs of loss and gradient, without dropout, in one process."""

    speedup: float
    """Seconds of one-by-one training over seconds of packed training, median of the pairs."""
    gradient_error: float
    """Distance of the packed gradient from the one-by-one gradient, relative to the latter's norm; largest value."""
    samples_per_second: float
    """Samples per second of packed training."""
    catalogue_speedup: float
    """Seconds of packed training over seconds of the same with finetune.vocabulary=catalogue, median of the pairs."""
    vocabulary: int
    """Tokens that the catalogue's titles use."""
    one_by_one_samples_per_second: float
    distinct_tokens: int
    """Tokens that packed training runs."""
    tokens_one_by_one: int
    """Tokens that one-by-one training runs."""
    samples: int
    batch_size: int
    """Sequences in a padded batch: the fastest of 1 to 16 for one-by-one training."""
    threads: int
    two_workers_over_one: float | None
    """Samples per second of jobs/finetune.py with two workers over those with one, over finetune.samples (null:
    bench.samples). For each worker the job has workers.cpus cores (`bench.cores`). None if two do not fit."""


def bench_finetune(config: Config) -> FinetuneBenchmark:
    """Run `bench.samples` training samples both ways, `bench.repeats` times in turn; then train with 1 and 2 workers.

    Leaves nothing in the workspace.
    """
    check_training(config)
    check_layers(config)
    two = workers_that_fit(config) > 1
    dataset = Dataset.open(Workspace.open(config.workspace))
    settings = config.replace({"finetune.dropout": 0.0}).finetune
    dtype = resolve_dtype(config.model, config.device)
    model = load_trainable(config.model, settings, dtype).to(config.device)
    torch.set_num_threads(config.bench.threads or config.workers.cpus)
    phraser = SamplePhraser.of_model(config, dataset.items()["title"].to_pylist())
    vocabulary = torch.from_numpy(phraser.vocabulary()).long().to(config.device)
    batches = _batches(config, dataset, phraser)

    def packed(tokens: Tensor | None = None) -> Tensor:
        return _gradient(model, (packed_loss(model, batch, tokens)[0] for batch in batches))

    size = min(BATCH_SIZES, key=lambda size: timed(lambda: _one_by_one(model, batches[:1], size))[0])
    pairs, of_catalogue, errors = [], [], []
    for _ in range(config.bench.repeats):
        slow, expected = timed(lambda: _one_by_one(model, batches, size))
        fast, found = timed(packed)
        pairs.append((slow, fast))
        of_catalogue.append(fast / timed(lambda: packed(vocabulary))[0])
        errors.append(float((found - expected).norm() / expected.norm()))
    samples = sum(map(len, batches))
    return FinetuneBenchmark(
        speedup=round(median(slow / fast for slow, fast in pairs), 3),
        gradient_error=max(errors),
        catalogue_speedup=round(median(of_catalogue), 3),
        vocabulary=len(vocabulary),
        samples_per_second=round(samples / median(fast for _, fast in pairs), 3),
        one_by_one_samples_per_second=round(samples / median(slow for slow, _ in pairs), 3),
        distinct_tokens=sum(plan_forest(batch.sequences).tokens.size for batch in batches),
        tokens_one_by_one=sum(batch.sequences.tokens.size for batch in batches),
        samples=samples,
        batch_size=size,
        threads=torch.get_num_threads(),
        two_workers_over_one=round(_rate(config, 2) / _rate(config, 1), 3) if two else None,
    )


def _batches(config: Config, dataset: Dataset, phraser: SamplePhraser) -> list[TrainingSamples]:
    """Return the first samples of the first epoch, in micro-batches."""
    table = SampleTable.read(dataset, Split.TRAIN, config, config.finetune.samples)
    rows = table.epoch(config.finetune.seed, 0)[: config.bench.samples]
    return phraser.batches(table, rows, config.finetune.micro_batch_size)


def _one_by_one(model: Any, batches: list[TrainingSamples], size: int) -> Tensor:
    """Return the gradient of all sequences in padded batches of `size`, each of sequences of similar length."""

    def losses() -> Iterator[Tensor]:
        for batch in batches:
            order = np.argsort(batch.sequences.lengths, kind="stable")
            for rows in np.array_split(order, -(-order.size // size)):
                sequences = Prompts.join([batch.sequences[n] for n in rows])
                yield padded_loss(model, TrainingSamples(sequences, batch.target_lengths[rows], batch.ids[rows]))[0]

    return _gradient(model, losses())


def _gradient(model: Any, losses: Iterable[Tensor]) -> Tensor:
    """Return the sum of the gradients of these losses."""
    model.zero_grad()
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
    return torch.cat([w.grad.flatten() for w in model.parameters() if w.requires_grad and w.grad is not None])


def _rate(config: Config, workers: int) -> float:
    """Return the samples per second of a training of one epoch."""
    name = f"bench-{workers}"
    samples = config.finetune.samples or config.bench.samples
    settings = {"name": name, "epochs": 1, "samples": samples, "valid_samples": 50, "trackers": []}
    changes = {f"finetune.{key}": value for key, value in settings.items()}
    changed = config.replace(changes | {"workers.min": workers, "workers.max": workers})
    workspace = Workspace.open(config.workspace)
    for left in (name, run_folder(identify_run(changed, Dataset.open(workspace)))):  # by a run that was killed
        workspace.delete(left)
    result = on_cores_of_its_workers(finetune, changed)
    workspace.delete(name)
    return result.samples / result.seconds

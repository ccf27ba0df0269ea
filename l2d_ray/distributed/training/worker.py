"""One worker of a training, with DeepSpeed: the loop, its checkpoints, and the weights of the best epoch.

The workers first sum every number that decides the next step: losses, counts of numbers that are not finite, whether a
checkpoint is due. So all of them decide alike.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.exceptions import RayError
from torch import Tensor

from l2d_ray.config import Config
from l2d_ray.core.packing import TrainingSamples
from l2d_ray.distributed.training.checkpoints import OWNER, best_folder
from l2d_ray.distributed.training.engine import make_engine
from l2d_ray.distributed.training.plan import TrainingData, WorkerPlan
from l2d_ray.errors import InputError
from l2d_ray.models.backbone import load_tokenizer
from l2d_ray.models.causal_loss import runs_packed
from l2d_ray.models.checkpoint import find_model
from l2d_ray.models.identity import resolve_dtype
from l2d_ray.models.trainable import load_trainable, save_trained, trained_state, without_adapter
from l2d_ray.prefetch import prefetch
from l2d_ray.stages.finetuning import Progress, SamplePhraser
from l2d_ray.workspace import Workspace

TAG = "state"
"""Name of DeepSpeed's folder in a checkpoint."""
PADDED_BATCH_SIZE = 5
"""Largest mean size of micro-batches where every sample runs in full, which takes more memory. None has more than 8."""


def train(plan: WorkerPlan) -> dict[str, Any]:
    """Train to the end. Return `Progress` as a dictionary, or `{"error": …}` for an error that no retry would solve."""
    try:
        return asdict(_Worker(plan).run())
    except InputError as error:
        return {"error": str(error)}


class _Worker:
    """A training as one worker runs it."""

    def __init__(self, plan: WorkerPlan) -> None:
        config = Config(**plan.config)
        self._plan, self._config, self._finetune = plan, config, config.finetune
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        torch.set_num_threads(config.workers.cpus)
        self._device = ray.train.torch.get_device()
        self._workspace = Workspace.open(config.workspace)
        dtype = resolve_dtype(config.model, config.device)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # all_gather_object sends objects through this device
        with self._together():
            self._model = load_trainable(config.model, config.finetune, dtype).to(self._device)
        packed = self._sum([runs_packed(self._model, dtype)])[0] == self._world
        self._schedule = plan.schedule
        if not packed:
            family = type(without_adapter(self._model)).__name__
            self._send(f"{family} cannot run packed: every sample is trained on in full, which is slower")
            size = min(PADDED_BATCH_SIZE, plan.schedule.micro_batch_size)
            self._schedule = replace(plan.schedule, micro_batch_size=size)
        data: TrainingData = ray.get(plan.data)
        self._phraser, self._table = SamplePhraser.of_model(config, data.titles), data.train
        rows = np.arange(len(data.valid))
        self._valid = self._phraser.batches(data.valid, rows, self._schedule.micro_batch_size)
        titles_only = config.finetune.vocabulary == "catalogue"
        vocabulary = torch.from_numpy(self._phraser.vocabulary()).long() if titles_only else None
        self._engine = make_engine(self._model, packed, vocabulary, config.finetune, dtype, self._schedule)
        self._progress = self._restore()
        self._started: float | None = None
        self._saved = time.monotonic()

    def run(self) -> Progress:
        """Train from the last checkpoint, or the beginning, to the end."""
        progress = self._progress
        for micro_batches in prefetch(self._batches()):
            if len(progress.losses) - progress.best_epoch >= self._finetune.patience:
                break
            # Time counts from the first batch on: `seconds` are those of training, not of starting.
            self._started = self._started or time.monotonic() - progress.seconds
            self._step(micro_batches)
            if progress.step % self._schedule.steps_per_epoch == 0:
                if progress.end_epoch(self._validate()):
                    self._keep_best()
                if not progress.best_epoch:
                    raise InputError(
                        f"the validation loss is not finite after step {progress.step}; lower finetune.learning_rate"
                    )
                self._checkpoint()
            elif self._is_time(progress.step):
                self._checkpoint()
        return progress

    def _batches(self) -> Iterator[list[TrainingSamples]]:
        """Yield this worker's micro-batches of each step that the checkpoint does not have."""
        steps = self._schedule.divide(self._table, self._finetune.seed)
        for parts in islice(steps, self._progress.step, None):
            yield [self._phraser.phrase(self._table, part) for part in parts[self._rank]]

    def _step(self, micro_batches: list[TrainingSamples]) -> None:
        """Run one optimizer step over this worker's micro-batches, and report it."""
        samples = self._sum([sum(map(len, micro_batches))])[0]
        loss_sum, distinct, one_by_one = self._backward(micro_batches, samples)
        norm = self._optimize()
        if not 0 <= norm < np.inf and self._config.model.dtype != "float16":  # DeepSpeed skips such steps of float16
            self._stop("gradient", [sample for batch in micro_batches for sample in batch.ids.tolist()])
        self._progress.seconds = time.monotonic() - (self._started or 0)
        every = max(1, self._schedule.steps // 200)
        self._progress.count_step(int(samples), int(distinct), int(one_by_one), loss_sum, every)
        metrics = {"loss": loss_sum / samples, "learning_rate": self._engine.get_lr()[0]}
        self._report(metrics | {"gradient_norm": norm})

    def _backward(self, micro_batches: list[TrainingSamples], samples: float) -> tuple[float, float, float]:
        """Compute the gradient of the mean loss over the `samples` of all workers.

        Returns the sum of the losses, the distinct tokens and the tokens one by one, of all workers.
        """
        totals, not_finite = np.zeros(3), []
        for number, batch in enumerate(micro_batches):
            # Dropout depends on the position alone, so that a resumed run draws the same.
            torch.manual_seed(hash((self._finetune.seed, self._progress.step, number, self._rank)))
            loss, counts = self._engine(batch)
            if not torch.isfinite(loss):
                not_finite += batch.ids.tolist()
            # DeepSpeed averages over workers and micro-batches; this factor makes that the mean over the samples.
            self._engine.backward(loss * (self._world * len(micro_batches) / samples))
            totals += [loss.item(), counts.distinct_tokens, counts.tokens]
            if number + 1 < len(micro_batches):
                self._engine.step()
        loss_sum, distinct, one_by_one, failures = self._sum([*totals, len(not_finite)])
        if failures or not np.isfinite(loss_sum):
            self._stop("loss", not_finite)
        return loss_sum, distinct, one_by_one

    def _optimize(self) -> float:
        """Apply the gradient and return its norm, which ZeRO gives as -1 if it is infinite."""
        gradients = [weight.grad for weight in self._model.parameters() if weight.grad is not None]
        before = torch.nn.utils.get_total_norm(gradients)
        self._engine.step()
        norm = self._engine.get_global_grad_norm()  # None with ZeRO stage 0 and float32
        return float(before if norm is None else norm)

    def _stop(self, quantity: str, sample_ids: list[int]) -> None:
        """Raise InputError with the sample ids of all workers."""
        of_workers: list[list[int]] = [[]] * self._world
        dist.all_gather_object(of_workers, sample_ids)
        ids = [str(sample) for of_worker in of_workers for sample in of_worker]
        raise InputError(
            f"the {quantity} is not finite in step {self._progress.step + 1}, samples {', '.join(ids[:20])}"
            f"{' …' if len(ids) > 20 else ''}; lower finetune.learning_rate or inspect these samples"
        )

    def _validate(self) -> float:
        """Return the mean loss over the validation samples. Every worker runs the same number of batches."""
        self._engine.eval()
        valid, total = self._valid, 0.0
        with torch.no_grad():
            for start in range(0, len(valid), self._world):
                number = start + self._rank
                loss, _ = self._engine(valid[min(number, len(valid) - 1)])
                total += float(loss) if number < len(valid) else 0.0
        self._engine.train()
        loss = self._sum([total])[0] / sum(map(len, valid))
        self._report({"valid_loss": loss})
        return loss

    def _keep_best(self) -> None:
        trainable = [weight for weight in self._model.parameters() if weight.requires_grad]
        sharded = self._finetune.zero_stage == 3
        with deepspeed.zero.GatheredParameters(trainable, enabled=sharded):
            state = trained_state(self._model) if self._rank == 0 else {}
        with self._together():
            if self._rank == 0:
                self._save(state)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Raise an InputError of the block in all workers: the others would wait for this one for half an hour."""
        problem = None
        try:
            yield
        except InputError as error:
            problem = str(error)
        problems: list[str | None] = [None] * self._world
        dist.all_gather_object(problems, problem)
        for first in filter(None, problems):
            raise InputError(first)

    def _save(self, state: dict[str, Tensor]) -> None:
        tokenizer = load_tokenizer(find_model(self._config.model))
        with tempfile.TemporaryDirectory() as folder:
            save_trained(self._model, state, tokenizer, Path(folder))
            target = best_folder(self._plan.run, self._progress.best_epoch)
            Workspace.open(folder).copy("", self._workspace, target)

    def _is_time(self, step: int) -> bool:
        minutes = (time.monotonic() - self._saved) / 60
        due = step % self._finetune.checkpoint_steps == 0 or minutes > self._finetune.checkpoint_minutes
        return self._sum([due])[0] > 0

    def _checkpoint(self) -> None:
        """Write a checkpoint: each worker writes its part, and Ray Train puts all parts into the workspace."""
        state = {"progress": asdict(self._progress)}
        with tempfile.TemporaryDirectory() as folder:
            if self._rank == 0:
                (Path(folder) / OWNER).write_text(json.dumps({"run": self._plan.run, "workers": self._world}))
            self._engine.save_checkpoint(folder, tag=TAG, client_state=state, exclude_frozen_parameters=True)
            metrics = {"step": self._progress.step}
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
        self._saved = time.monotonic()

    def _restore(self) -> Progress:
        """Load weights and optimizer of the last checkpoint, if there is one, and return its progress."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return Progress()
        with checkpoint.as_directory() as folder:
            _, state = self._engine.load_checkpoint(folder, tag=TAG, load_module_strict=False)
        return Progress(**state["progress"])

    def _sum(self, values: list[Any]) -> list[float]:
        """Return the sums of these numbers over the workers."""
        numbers = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(numbers)
        return list(numbers.tolist())

    def _report(self, metrics: dict[str, float]) -> None:
        done = {key: getattr(self._progress, key) for key in ("step", "samples", "distinct_tokens", "seconds")}
        self._send(done | {"metrics": metrics})

    def _send(self, message: dict[str, Any] | str) -> None:
        """Send a message to the driver. Training goes on if the queue is lost, which only feeds the progress bar."""
        if self._rank == 0 and self._plan.messages is not None:
            with suppress(RayError):
                self._plan.messages.put(message)

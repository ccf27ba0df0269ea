"""One worker of a training, with DeepSpeed: the loop, its checkpoints, and the weights of the best epoch.

Everything that decides what happens next (losses, a number that is not finite, the time for a checkpoint) is summed
over the workers first, so that all of them always decide alike.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.exceptions import RayError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from l2d_ray.config import Config, FinetuneConfig
from l2d_ray.core.packing import TrainingSamples
from l2d_ray.distributed.training.plan import WorkerPlan, best_folder
from l2d_ray.errors import InputError
from l2d_ray.models.backbone import load_tokenizer, resolve_dtype
from l2d_ray.models.causal_loss import LossCounts, packed_loss, padded_loss, runs_packed
from l2d_ray.models.checkpoint import find_model
from l2d_ray.models.trainable import load_trainable, save_trained, trained_state, without_adapter
from l2d_ray.stages.finetuning import Progress, learning_rate_factor, pack, unpack
from l2d_ray.workspace import Workspace

TAG = "state"
OWNER = "owner.json"
"""In every checkpoint: whose it is. Read before anything is loaded that might not fit."""
PADDED_BATCH_SIZE = 8
"""Samples of a micro-batch, at most, where every sample runs in full, which takes more memory."""
# Or DeepSpeed compiles C++ on every CPU worker at its start, to make sums within one machine faster.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def train(plan: WorkerPlan) -> dict[str, Any]:
    """Train to the end; returns `Progress` as a dictionary, or `{"error": …}` for what no retry would mend."""
    try:
        return asdict(_Worker(plan).run())
    except InputError as error:
        return {"error": str(error)}


class _Loss(nn.Module):
    """The loss as a module, because DeepSpeed prepares what a module's forward needs."""

    def __init__(self, model: Any, packed: bool) -> None:
        super().__init__()
        self.model, self._loss = model, packed_loss if packed else padded_loss

    def forward(self, samples: TrainingSamples) -> tuple[Tensor, LossCounts]:
        """`packed_loss`, or `padded_loss`."""
        return self._loss(self.model, samples)


class _Worker:
    def __init__(self, plan: WorkerPlan) -> None:
        config = Config(**plan.config)
        self._plan, self._config, self._finetune = plan, config, config.finetune
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        torch.set_num_threads(config.workers.cpus)
        self._device = ray.train.torch.get_device()
        self._workspace = Workspace.open(config.workspace)
        dtype = resolve_dtype(config.model, config.device)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # where objects that are gathered pass through
        problem = None
        try:
            self._model = load_trainable(config.model, config.finetune, dtype).to(self._device)
        except InputError as error:  # of this node alone, maybe
            problem = str(error)
        self._raise_together(problem)
        packed = self._sum([runs_packed(self._model, dtype)])[0] == self._world
        self._schedule, self._valid = plan.schedule, plan.valid
        if not packed:
            family = type(without_adapter(self._model)).__name__
            self._put(f"{family} cannot run packed: every sample is trained on in full, which is slower")
            size = min(PADDED_BATCH_SIZE, plan.schedule.micro_batch_size)
            self._schedule = replace(plan.schedule, micro_batch_size=size)
            self._valid = unpack(pack(0, plan.valid), -(-sum(map(len, plan.valid)) // size))
        self._engine = self._prepare(dtype, packed)
        self._progress = self._restored()
        self._started: float | None = None
        self._saved = time.monotonic()

    def run(self) -> Progress:
        """The whole training."""
        progress = self._progress
        for step, micro_batches in self._batches():
            if step < progress.step:
                continue  # done before the checkpoint that this run goes on from
            if len(progress.losses) - progress.best_epoch >= self._finetune.patience:
                break
            if step != progress.step:  # else workers would wait for each other for ever, or learn out of order
                raise RuntimeError(f"Ray Data gave worker {self._rank} a part of step {step}, not of {progress.step}")
            # Not before the first batch is there: `seconds` are those of training, not of starting.
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

    def _prepare(self, dtype: str, packed: bool) -> Any:
        """A DeepSpeed engine around the model, with its optimizer and schedule."""
        finetune, steps = self._finetune, self._schedule.steps
        trainable = [weight for weight in self._model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=finetune.learning_rate, weight_decay=finetune.weight_decay)
        factor = partial(learning_rate_factor, warmup=min(finetune.warmup_steps, steps // 10), steps=steps)
        engine, *_ = deepspeed.initialize(
            model=_Loss(self._model, packed),
            model_parameters=trainable,
            optimizer=optimizer,
            lr_scheduler=LambdaLR(optimizer, factor),
            config=engine_settings(finetune, dtype, self._schedule.micro_batches, self._world),
            dist_init_required=False,
        )
        return engine

    def _batches(self) -> Iterator[tuple[int, list[TrainingSamples]]]:
        """This worker's micro-batches of every step."""
        for row in ray.train.get_dataset_shard("train").iter_rows():
            yield int(row["step"]), unpack(row, self._schedule.micro_batches)

    def _step(self, micro_batches: list[TrainingSamples]) -> None:
        """One optimizer step: a part of the gradient from every micro-batch."""
        progress = self._progress
        samples = self._sum([sum(map(len, micro_batches))])[0]
        totals, strange = np.zeros(3), []
        for number, batch in enumerate(micro_batches):
            # Dropout depends on the position only, so that a run that is continued draws the same.
            torch.manual_seed(hash((self._finetune.seed, progress.step, number, self._rank)))
            loss, counts = self._engine(batch)
            if not torch.isfinite(loss):
                strange += batch.ids.tolist()
            # DeepSpeed averages over workers and micro-batches; the gradient wanted is the mean over the samples.
            self._engine.backward(loss * (self._world * len(micro_batches) / samples))
            totals += [loss.item(), counts.distinct_tokens, counts.tokens]
            if number + 1 < len(micro_batches):
                self._engine.step()
        loss_sum, distinct, one_by_one, failures = self._sum([*totals, len(strange)])
        if failures or not np.isfinite(loss_sum):
            self._stop("loss", strange)
        gradients = [weight.grad for weight in self._model.parameters() if weight.grad is not None]
        own_norm = torch.nn.utils.get_total_norm(gradients)  # at stage 0 of float32, where DeepSpeed does not tell
        self._engine.step()
        norm = self._engine.get_global_grad_norm()  # ZeRO's is -1 for infinite
        norm = float(own_norm if norm is None else norm)
        if not 0 <= norm < np.inf and self._config.model.dtype != "float16":
            self._stop("gradient", [sample for batch in micro_batches for sample in batch.ids.tolist()])
        progress.step += 1
        progress.samples += int(samples)
        progress.distinct_tokens += int(distinct)
        progress.tokens_one_by_one += int(one_by_one)
        progress.epoch_loss += loss_sum
        progress.epoch_samples += int(samples)
        progress.seconds = time.monotonic() - (self._started or 0)
        every = max(1, self._schedule.steps // 200)
        if progress.step % every == 0:
            progress.curve.append(
                {"step": progress.step, "loss": loss_sum / samples, "distinct_tokens": progress.distinct_tokens}
            )
        metrics = {"loss": loss_sum / samples, "learning_rate": self._engine.get_lr()[0]}
        self._tell(metrics | {"gradient_norm": norm})

    def _stop(self, what: str, strange: list[int]) -> None:
        """Raise InputError with the samples of all workers; of float16, DeepSpeed itself skips such gradients."""
        everyone: list[list[int]] = [[]] * self._world
        dist.all_gather_object(everyone, strange)
        ids = [str(sample) for own in everyone for sample in own]
        raise InputError(
            f"the {what} is not finite in step {self._progress.step + 1}, samples {', '.join(ids[:20])}"
            f"{' …' if len(ids) > 20 else ''}; lower finetune.learning_rate or look at these samples"
        )

    def _validate(self) -> float:
        """Mean loss over the validation samples, dealt out to the workers; every worker runs as many batches."""
        self._engine.eval()
        valid, total = self._valid, 0.0
        with torch.no_grad():
            for start in range(0, len(valid), self._world):
                mine = start + self._rank
                loss, _ = self._engine(valid[min(mine, len(valid) - 1)])
                total += float(loss) if mine < len(valid) else 0.0
        self._engine.train()
        loss = self._sum([total])[0] / sum(map(len, valid))
        self._tell({"valid_loss": loss})
        return loss

    def _keep_best(self) -> None:
        trainable = [weight for weight in self._model.parameters() if weight.requires_grad]
        sharded = self._finetune.zero_stage == 3
        with deepspeed.zero.GatheredParameters(trainable, enabled=sharded):
            state = trained_state(self._model) if self._rank == 0 else {}
        problem = None
        if self._rank == 0:
            try:
                self._save(state)
            except InputError as error:
                problem = str(error)
        self._raise_together(problem)

    def _raise_together(self, problem: str | None) -> None:
        """Raise the InputError that any worker met in all of them: the others would wait for it for half an hour."""
        everyone: list[str | None] = [None] * self._world
        dist.all_gather_object(everyone, problem)
        if any(everyone):
            raise InputError(next(filter(None, everyone)))

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
        """Leave a checkpoint: every worker writes its part, Ray Train puts them into the workspace together."""
        state = {"progress": asdict(self._progress)}
        with tempfile.TemporaryDirectory() as folder:
            if self._rank == 0:
                (Path(folder) / OWNER).write_text(json.dumps({"run": self._plan.run, "workers": self._world}))
            self._engine.save_checkpoint(folder, tag=TAG, client_state=state, exclude_frozen_parameters=True)
            metrics = {"step": self._progress.step}
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
        self._saved = time.monotonic()

    def _restored(self) -> Progress:
        """Where the last checkpoint was, its weights and optimizer loaded; or the beginning."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return Progress()
        with checkpoint.as_directory() as folder:
            owner = json.loads((Path(folder) / OWNER).read_text())
            if owner["run"] != self._plan.run:
                raise InputError(
                    f"{checkpoint.path}: is of another model or configuration; delete its folder in checkpoints/"
                )
            if owner["workers"] != self._world and self._finetune.zero_stage:
                raise InputError(
                    f"{checkpoint.path}: was written by {owner['workers']} workers and ZeRO's shards cannot be dealt to"
                    f" {self._world}; set workers.max={owner['workers']}, or delete its folder in checkpoints/"
                )
            _, state = self._engine.load_checkpoint(folder, tag=TAG, load_module_strict=False)
        return Progress(**state["progress"])

    def _sum(self, values: list[Any]) -> list[float]:
        """The sums of some numbers over the workers."""
        numbers = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(numbers)
        return list(numbers.tolist())

    def _tell(self, metrics: dict[str, float]) -> None:
        done = {key: getattr(self._progress, key) for key in ("step", "samples", "distinct_tokens", "seconds")}
        self._put(done | {"metrics": metrics})

    def _put(self, message: dict[str, Any] | str) -> None:
        """Tell the driver, if there still is what takes it: a training does not fail of its progress bar."""
        if self._rank == 0 and self._plan.progress is not None:
            with suppress(RayError):
                self._plan.progress.put(message)


def engine_settings(finetune: FinetuneConfig, dtype: str, micro_batches: int, workers: int) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    zero: dict[str, Any] = {"stage": finetune.zero_stage}
    if finetune.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if finetune.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_batch_size": finetune.micro_batch_size * micro_batches * workers,
        "train_micro_batch_size_per_gpu": finetune.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": finetune.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }

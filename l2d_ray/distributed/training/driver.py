"""Fine-tuning with Ray Train and DeepSpeed: from samples to an adapter.

The driver deals the samples out (`finetuning.Schedule`), Ray Data phrases them ahead of the workers, and Ray Train's
workers (`worker.py`) train. What survives a crash of anything are the checkpoints in the workspace: a lost
worker goes on from the last one, and so does the same command after a lost driver.
"""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
import ray
import ray.data
import ray.train
from pyarrow import fs as pafs
from ray.exceptions import RayError
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.queue import Queue

from l2d_ray.config import Config
from l2d_ray.data.dataset import Dataset
from l2d_ray.data.files import join
from l2d_ray.distributed.progress import Progress
from l2d_ray.distributed.screen import say
from l2d_ray.distributed.training.checkpoints import mend_list
from l2d_ray.distributed.training.phrasing import PhraserActor, sample_phraser
from l2d_ray.distributed.training.plan import WorkerPlan, best_folder
from l2d_ray.distributed.workers import check_room, workers_that_fit
from l2d_ray.errors import InputError
from l2d_ray.models.backbone import identify, resolve_dtype
from l2d_ray.models.trainable import check_target_modules
from l2d_ray.schema import Split
from l2d_ray.stages.checks import check_training
from l2d_ray.stages.finetuning import SampleTable, Schedule, Training, deciding_settings, run_digest, settings_of
from l2d_ray.stages.reports import plot_training, png
from l2d_ray.stages.settings import check_data
from l2d_ray.tracking import log_to, open_trackers
from l2d_ray.workspace import Workspace

FOLDER = "checkpoints"
MOST_BLOCKS = 4096
"""About so many blocks of Ray Data hold a training, each of which costs the driver a millisecond before it begins."""
SILENCE = 60
"""Seconds without a first step after which the driver says what may be waited for."""


@dataclass(frozen=True)
class FinetuneResult:
    """What was trained; counts are of the whole training, over all attempts."""

    samples: int
    """Trained on, counted in every epoch."""
    distinct_tokens: int
    """Tokens that went through the model."""
    tokens_one_by_one: int
    """Tokens that would have, one sample at a time."""
    epochs: int
    train_loss: float
    """Of the best epoch, a title's token."""
    valid_loss: float
    """After it."""
    seconds: float
    adapter: str
    """Where the result is: for model.adapter, or for model.name if finetune.method is full."""


def finetune(config: Config) -> FinetuneResult:
    """Fine-tune, or finish fine-tuning, as `config` describes; leave `<finetune.name>/` with `training.json`.

    Raises InputError if there is no dataset, model or training sample, if they do not fit the settings, if the
    workers do not fit this machine, or if the folder holds the result of another training.
    """
    workspace = Workspace.open(config.workspace)
    dataset = Dataset.open(workspace)
    check_data(config, dataset)
    check(config)
    run = identify_run(config, dataset)
    done = _done(workspace, config, run)
    if done:
        return done
    table = SampleTable.read(dataset, Split.TRAIN, config, config.finetune.samples)
    valid = SampleTable.read(dataset, Split.VALID, config, config.finetune.valid_samples)
    for setting, split, samples in (("samples", Split.TRAIN, table), ("valid_samples", Split.VALID, valid)):
        if not len(samples):
            known, most = dataset.num_samples(split), getattr(config.finetune, setting)
            remedy = f"finetune.{setting}={most} chose none of them; raise it" if known else "prepare more data"
            raise InputError(f"{workspace.path('dataset')}: has {known} {split.name.lower()} samples; {remedy}")
    finetuning = config.finetune
    workers = min(config.workers.max or workers_that_fit(config), len(table))
    check_room(config, workers)
    schedule = Schedule(len(table), finetuning.epochs, workers, finetuning.batch_size, finetuning.micro_batch_size)
    phraser = sample_phraser(config, dataset.items()["title"].to_pylist(), valid)
    valid_batches = [phraser.phrase(rows) for rows in _micro(np.arange(len(valid)), finetuning.micro_batch_size)]
    with _shown(config, workspace, run, schedule) as queue:
        plan = WorkerPlan(config.model_dump(mode="json"), run, schedule, valid_batches, queue)
        progress = _train(config, workspace, plan, dataset, table)
    return _finish(workspace, config, run, progress)


def identify_run(config: Config, dataset: Dataset) -> str:
    """The name of a training's checkpoints: what decides its result."""
    model = identify(config.model, resolve_dtype(config.model, config.device))
    text = f"{model.base_model} {model.num_layers} {model.dtype} {model.tokenizer}"
    return run_digest(config, text, dataset.digest)


def check(config: Config) -> None:
    """Raise InputError for settings that cannot work together, before any worker starts."""
    check_training(config)
    if config.finetune.method == "lora":
        check_target_modules(config.model, config.finetune)


def _train(
    config: Config, workspace: Workspace, plan: WorkerPlan, dataset: Dataset, table: SampleTable
) -> dict[str, Any]:

    def run_worker(plan: WorkerPlan) -> dict[str, Any]:
        # Nested, so that Ray ships the function itself and its controller imports neither this module nor DeepSpeed,
        # which takes seconds and reads the variable when it is imported: it would take whatever GPU it sees.
        os.environ["DS_ACCELERATOR"] = "cuda" if plan.config["workers"]["gpus"] else "cpu"
        from l2d_ray.distributed.training.worker import train

        return train(plan)

    finetuning, workers = config.finetune, plan.schedule.workers
    rows = list(_blocks(list(plan.schedule.deal(table, finetuning.seed)), workers))
    phrased = ray.data.from_items(rows, override_num_blocks=len(rows)).flat_map(
        PhraserActor,
        fn_constructor_args=(
            plan.config,
            dataset.items()["title"].to_pylist(),
            ray.put(table),
            plan.schedule.micro_batches,
        ),
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=0,  # next to nothing; and the workers may have all CPUs of the cluster
    )
    mend_list(workspace, f"{FOLDER}/{plan.run}")
    in_order = ray.data.ExecutionOptions(preserve_order=True)
    remote = not isinstance(workspace.filesystem, pafs.LocalFileSystem)
    trainer = TorchTrainer(
        run_worker,
        train_loop_config=plan,
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=config.device == "cuda",
            resources_per_worker={"CPU": config.workers.cpus, "GPU": config.workers.gpus},
        ),
        run_config=ray.train.RunConfig(
            name=plan.run,
            storage_path=workspace.path(FOLDER),
            storage_filesystem=workspace.filesystem if remote else None,
            failure_config=ray.train.FailureConfig(max_failures=finetuning.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=finetuning.keep_checkpoints),
        ),
        datasets={"train": phrased},
        dataset_config=ray.train.DataConfig(execution_options=in_order),
    )
    try:
        progress = trainer.fit().return_value
    except TrainingFailedError as error:
        raise _cause(error) from error
    if "error" in progress:
        raise InputError(progress["error"])
    return progress  # type: ignore[no-any-return]


def _blocks(steps: list[list[list[Any]]], workers: int) -> Iterator[dict[str, Any]]:
    """What `Schedule.deal` gave, a worker's part of some steps at a time, in turn: so does Ray Data deal out blocks of
    equal numbers of rows."""
    size = -(-len(steps) * workers // MOST_BLOCKS)
    for start in range(0, len(steps), size):
        for worker in range(workers):
            parts = [part for step in steps[start : start + size] for part in step[worker]]
            bounds = np.cumsum([part.size for part in parts])[:-1]
            yield {"step": start, "samples": np.concatenate(parts), "bounds": bounds}


def _cause(error: TrainingFailedError) -> Exception:
    """The disk that is full and the like, as an OSError; what else a worker failed of, as it is."""
    failures: list[Any] = list(getattr(error, "worker_failures", {}).values())
    causes = [cause for one in failures for cause in (one, getattr(one, "cause", None), one.__cause__)]
    return next((cause for cause in causes if isinstance(cause, OSError)), error)


def _micro(samples: Any, size: int) -> list[Any]:
    return np.array_split(samples, -(-samples.size // size))


@contextmanager
def _shown(config: Config, workspace: Workspace, run: str, schedule: Schedule) -> Iterator[Queue]:
    """A queue whose messages (`worker`) are drawn as a bar and go to the trackers."""
    local = isinstance(workspace.filesystem, pafs.LocalFileSystem)
    name = config.finetune.name
    folder = Path(workspace.path(f"{name}/tensorboard")) if local else Path(tempfile.mkdtemp())
    trackers = open_trackers(config.finetune.trackers, f"{name}-{run}", folder, settings_of(config))
    queue, ended = Queue(actor_options={"num_cpus": 0}), threading.Event()

    def show() -> None:
        begun, started, loss = time.monotonic(), None, float("nan")
        with Progress(schedule.steps, "fine-tuning", "steps") as bar:
            while not ended.is_set() or not queue.empty():
                try:
                    message = queue.get(timeout=0.5)
                except Empty:
                    if not started and time.monotonic() > begun + SILENCE:
                        say("no step yet: models are loaded, or wait for CPUs and GPUs (ray status)")
                        begun = float("inf")
                    continue
                except RayError:  # its node died, and with it what it had to say
                    break
                if isinstance(message, str):
                    say(message)
                    continue
                if started is None or message["step"] < bar.done:  # the first, or after a checkpoint
                    started = time.monotonic(), message
                    bar.resume_at(message["step"])
                seconds = max(time.monotonic() - started[0], 1e-9)
                rates = {key: (message[key] - started[1][key]) / seconds for key in ("samples", "distinct_tokens")}
                loss = message["metrics"].get("loss", loss)
                bar.advance(
                    message["step"] - bar.done,
                    f"loss {loss:.3f}, {rates['samples']:.1f} samples/s, {rates['distinct_tokens']:.0f} tokens/s",
                )
                log_to(trackers, message["step"], message["metrics"])

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        ended.set()
        thread.join(timeout=30)
        queue.shutdown()
        for tracker in trackers:
            tracker.close()
        if not local:
            Workspace.open(str(folder)).copy("", workspace, f"{name}/tensorboard")
            shutil.rmtree(folder)


def _done(workspace: Workspace, config: Config, run: str) -> FinetuneResult | None:
    """The result if this very training has ended. Raises InputError if the folder holds another's."""
    path = f"{config.finetune.name}/training.json"
    if not workspace.exists(path):
        return None
    training = Training.read(workspace, path)
    if training.run == run:
        workspace.delete(f"{FOLDER}/{run}")
        return _result(workspace, config, training)
    changed = [
        f"{section}.{key} ({training.settings[section].get(key)!r}, now {value!r})"
        for section, settings in deciding_settings(config).items()
        for key, value in settings.items()
        if training.settings[section].get(key) != value
    ]
    raise InputError(
        f"{workspace.path(path)}: is of another training: {', '.join(changed) or 'another model or dataset'}; set"
        " finetune.name to train beside it, or delete its folder"
    )


def _finish(workspace: Workspace, config: Config, run: str, progress: dict[str, Any]) -> FinetuneResult:
    """Move the best epoch's weights to their place, write the record last, and remove the checkpoints."""
    best, name = progress["best_epoch"], config.finetune.name
    losses = progress["losses"][best - 1]
    training = Training(
        run=run,
        settings=settings_of(config),
        epochs=len(progress["losses"]),
        train_loss=losses["train_loss"],
        valid_loss=losses["valid_loss"],
        **{key: progress[key] for key in ("samples", "distinct_tokens", "tokens_one_by_one", "best_epoch")},
        **{key: progress[key] for key in ("seconds", "losses", "curve")},
    )
    workspace.copy(best_folder(run, best), workspace, name)
    with workspace.create(f"{name}/training.png") as stream:
        stream.write(png(plot_training(training)))
    training.write(workspace, f"{name}/training.json")
    workspace.delete(f"{FOLDER}/{run}")
    return _result(workspace, config, training)


def _result(workspace: Workspace, config: Config, training: Training) -> FinetuneResult:
    fields = {key: value for key, value in training.model_dump().items() if key in FinetuneResult.__annotations__}
    return FinetuneResult(**fields, adapter=join(workspace.uri, config.finetune.name))

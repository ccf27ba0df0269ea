"""Fine-tuning with Ray Train and DeepSpeed: from samples to an adapter.

The driver plans the steps (`finetuning.Schedule`), and Ray Train's workers (`worker.py`) train on their parts of them.
Checkpoints in the workspace survive any crash: after a lost worker training resumes from the last one, and after a lost
driver the same command resumes it.
"""

import os
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray.train import TrainingFailedError

from l2d_ray.config import Config
from l2d_ray.data.dataset import Dataset
from l2d_ray.data.files import join
from l2d_ray.distributed.job import connect
from l2d_ray.distributed.training.checkpoints import FOLDER, best_folder, check_owner, repair_list, run_folder
from l2d_ray.distributed.training.monitor import monitored
from l2d_ray.distributed.training.plan import TrainingData, WorkerPlan
from l2d_ray.distributed.workers import training_workers
from l2d_ray.errors import InputError
from l2d_ray.models.identity import identify, resolve_dtype
from l2d_ray.schema import Split
from l2d_ray.stages.checks import check_training
from l2d_ray.stages.finetuning import SampleTable, Schedule, Training, deciding_settings, run_digest, settings_of
from l2d_ray.stages.reports import plot_training, png
from l2d_ray.stages.settings import check_data
from l2d_ray.workspace import Workspace


@dataclass(frozen=True)
class FinetuneResult:
    """Result of a training, with counts over all attempts."""

    samples: int
    """Samples trained on; a sample counts once an epoch."""
    distinct_tokens: int
    """Tokens that ran through the model."""
    tokens_one_by_one: int
    """Tokens that would have run if each sample had run alone."""
    epochs: int
    train_loss: float
    """Mean cross-entropy of a title's token during the best epoch."""
    valid_loss: float
    """Mean cross-entropy of a title's token on the validation samples after the best epoch."""
    seconds: float
    """Seconds spent training, over all attempts."""
    adapter: str
    """Location of the result: for model.adapter, or for model.name if finetune.method is full."""


def finetune(config: Config) -> FinetuneResult:
    """Fine-tune, or finish fine-tuning, as `config` describes; write `<finetune.name>/` with `training.json`.

    Raises InputError if there is no dataset, model or training sample, if they do not fit the settings, if the
    workers do not fit this machine, or if the folder holds the result of another training.
    """
    workspace = Workspace.open(config.workspace)
    dataset = Dataset.open(workspace)
    check_data(config, dataset)
    check_training(config)
    run = identify_run(config, dataset)
    done = _done(workspace, config, run)
    if done:
        return done
    check_layers(config)
    connect(config)
    table = _read_samples(dataset, Split.TRAIN, config, "samples")
    valid = _read_samples(dataset, Split.VALID, config, "valid_samples")
    finetuning = config.finetune
    workers = training_workers(config, len(table))
    check_owner(workspace, run, workers, finetuning.zero_stage)
    schedule = Schedule(len(table), finetuning.epochs, workers, finetuning.batch_size, finetuning.micro_batch_size)
    data = ray.put(TrainingData(dataset.items()["title"].to_pylist(), table, valid))
    with monitored(config, workspace, run, schedule.steps) as queue:
        plan = WorkerPlan(config.model_dump(mode="json"), run, schedule, data, queue)
        progress = _train(config, workspace, plan)
    return _finish(workspace, config, run, progress)


def identify_run(config: Config, dataset: Dataset) -> str:
    """Return the name of a training, a digest of everything that decides its result."""
    model = identify(config.model, resolve_dtype(config.model, config.device))
    text = f"{model.base_model} {model.num_layers} {model.dtype} {model.tokenizer}"
    return run_digest(config, text, dataset.digest)


def check_layers(config: Config) -> None:
    """Raise InputError if LoRA is for layers that the model does not have, before any worker starts."""
    if config.finetune.method == "lora":
        from l2d_ray.models.trainable import check_target_modules  # imports transformers, which takes seconds

        check_target_modules(config.model, config.finetune)


def _read_samples(dataset: Dataset, split: Split, config: Config, setting: str) -> SampleTable:
    """Read as many samples of a split as a setting of `finetune` says. Raises InputError if there are none."""
    limit = getattr(config.finetune, setting)
    table = SampleTable.read(dataset, split, config, limit)
    if not len(table):
        known = dataset.num_samples(split)
        remedy = (
            f"finetune.{setting}={limit} chose none of them; raise it"
            if known
            else "prepare more data, or with another data.split"
        )
        raise InputError(f"{dataset.workspace.path('dataset')}: has {known} {split.name.lower()} samples; {remedy}")
    return table


def _train(config: Config, workspace: Workspace, plan: WorkerPlan) -> dict[str, Any]:
    """Run the workers to the end and return their `Progress`."""

    def run_worker(plan: WorkerPlan) -> dict[str, Any]:
        # A nested function, because Ray ships its code: the controller then imports neither this module nor DeepSpeed,
        # which takes seconds. DeepSpeed reads the variable when it is imported; without it, it would search for a GPU
        # and warn if it found none.
        os.environ["DS_ACCELERATOR"] = "cuda" if plan.config["workers"]["gpus"] else "cpu"
        from l2d_ray.distributed.training.worker import train

        return train(plan)

    from ray.train.torch import TorchTrainer  # imports PyTorch, which takes seconds

    finetuning, workers = config.finetune, plan.schedule.workers
    repair_list(workspace, plan.run)
    trainer = TorchTrainer(
        run_worker,
        train_loop_config=plan,
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=config.device == "cuda",
            resources_per_worker={"CPU": config.workers.cpus, "GPU": config.workers.gpus},
            label_selector=config.workers.labels or None,
        ),
        run_config=ray.train.RunConfig(
            name=plan.run,
            storage_path=workspace.path(FOLDER),
            storage_filesystem=None if workspace.is_local else workspace.filesystem,
            failure_config=ray.train.FailureConfig(max_failures=finetuning.max_failures, max_preemption_failures=-1),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=finetuning.keep_checkpoints),
        ),
    )
    try:
        progress = trainer.fit().return_value
    except TrainingFailedError as error:
        raise _cause(error) from error
    if "error" in progress:
        raise InputError(progress["error"])
    return progress  # type: ignore[no-any-return]


def _cause(error: TrainingFailedError) -> Exception:
    """Return the OSError of a worker, such as a full disk, if there is one, and else the error itself."""
    failures: list[Any] = list(getattr(error, "worker_failures", {}).values())
    causes = [cause for one in failures for cause in (one, getattr(one, "cause", None), one.__cause__)]
    return next((cause for cause in causes if isinstance(cause, OSError)), error)


def _done(workspace: Workspace, config: Config, run: str) -> FinetuneResult | None:
    """Return the result if this training has ended. Raises InputError if the folder holds another training."""
    path = f"{config.finetune.name}/training.json"
    if not workspace.exists(path):
        return None
    training = Training.read(workspace, path)
    if training.run == run:
        workspace.delete(run_folder(run))
        return _result(workspace, config, training)
    changed = [
        f"{section}.{key} ({training.settings[section].get(key)!r}, now {value!r})"
        for section, settings in deciding_settings(config).items()
        for key, value in settings.items()
        if training.settings[section].get(key) != value
    ]
    raise InputError(
        f"{workspace.path(path)}: belongs to another training: {', '.join(changed) or 'another model or dataset'}; set"
        " finetune.name to keep both, or delete its folder"
    )


def _finish(workspace: Workspace, config: Config, run: str, progress: dict[str, Any]) -> FinetuneResult:
    """Copy the weights of the best epoch to their place, write the record last, and remove the checkpoints."""
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
    workspace.delete(run_folder(run))
    return _result(workspace, config, training)


def _result(workspace: Workspace, config: Config, training: Training) -> FinetuneResult:
    fields = {key: value for key, value in training.model_dump().items() if key in FinetuneResult.__annotations__}
    return FinetuneResult(**fields, adapter=join(workspace.uri, config.finetune.name))

"""Training of a recommender without Ray: its settings, its checkpoints in the workspace, and its result.

    checkpoints/<run>/state.safetensors         after each epoch, replaced as a whole; deleted at the end
    recommenders/<name>/weights-….safetensors   the weights of the best epoch
    recommenders/<name>/training.json           written last

A run is everything that decides the weights. The same command goes on from the last complete epoch.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from l2d_ray.config import Config, flatten
from l2d_ray.data.dataset import Dataset
from l2d_ray.data.samples import Sample, choose_samples
from l2d_ray.errors import InputError
from l2d_ray.recommenders.memory_rows import ROWS, identify_rows
from l2d_ray.recommenders.registry import MODULES, declaration, find
from l2d_ray.recommenders.title_states import identify_titles
from l2d_ray.recommenders.trained import (
    Epoch,
    TrainingRecord,
    folder_of,
    load_tensors,
    record_of,
    write_weights,
)
from l2d_ray.recommenders.training import Learner, Progress, Trainer, TrainingData, fit, mean_ndcg
from l2d_ray.schema import Split
from l2d_ray.stages.index_plan import with_snapshot
from l2d_ray.stages.settings import check_data, for_titles
from l2d_ray.workspace import Workspace

Report = Callable[[Sequence[Epoch]], None]
"""Is told all epochs so far: before the first one that runs, and after each. It may raise, to stop the training."""

BEST = "best."
"""First part of the names of the best weights in a checkpoint."""


@dataclass(frozen=True)
class TrainingPlan:
    """A training before anything runs."""

    config: Config
    """Its settings of `train` are those that the recommender is trained with."""
    trainer: Trainer
    dataset: Dataset
    settings: dict[str, Any] = field(init=False)
    """Settings that decide the weights, by dotted key."""
    run: str = field(init=False)
    """Digest of these settings, the recommender and the dataset."""

    def __post_init__(self) -> None:
        chosen = self.config.train.model_dump(mode="json")
        if not chosen["on_valid"]:  # the digest is that of trainings from when there was no such setting
            del chosen["on_valid"]
        settings = {f"train.{name}": value for name, value in chosen.items() if name not in self.trainer.unused}
        settings["recommend.exclude_seen"] = self.config.recommend.exclude_seen
        if self.trainer.reads_titles:
            settings |= identify_titles(self.config)
        if self.trainer.reads_memory:
            settings |= identify_rows(self.config)
        values = flatten(self.config.model_dump(mode="json"))
        settings |= {key: values[key] for key in self.trainer.settings}
        text = json.dumps([self.config.recommender, settings, self.dataset.digest], sort_keys=True)
        object.__setattr__(self, "settings", settings)
        object.__setattr__(self, "run", hashlib.sha256(text.encode()).hexdigest()[:16])

    @property
    def workspace(self) -> Workspace:
        """The workspace of the dataset and of the result."""
        return self.dataset.workspace

    @property
    def checkpoint(self) -> str:
        """Path of the checkpoint in the workspace."""
        return f"checkpoints/{self.run}/state.safetensors"

    def finished(self) -> TrainingRecord | None:
        """Return the record if this training has ended. Raises InputError if the folder holds another training."""
        path = record_of(self.config.recommender)
        if not self.workspace.exists(path):
            return None
        record = TrainingRecord.read(self.workspace, path)
        if record.run == self.run:
            return record
        changed = ", ".join(record.changes(self.settings))
        raise InputError(
            f"{self.workspace.path(path)}: belongs to another training: {changed or 'another dataset'}; set"
            f" recommender={self.config.recommender}-2 to keep both, or delete its folder"
        )


def plan_training(config: Config) -> TrainingPlan:
    """Plan the training of `recommender`, with its own defaults for settings of `train` that are not given.

    Raises InputError for a recommender that is unknown or not trained, for a given setting that it has no use for, and
    if there is no dataset.
    """
    trainer = find(config.recommender, config, "recommender").declaration.trainer
    if trainer is None:
        trained = [name for name, module in MODULES.items() if declaration(module).trainer]
        raise InputError(
            f"recommender={config.recommender!r}: needs no training; give one of {', '.join(trained)}, or run"
            " jobs/evaluate.py"
        )
    if trainer.reads_titles or trainer.reads_memory:
        config = for_titles(config)
    given = {key.removeprefix("train.") for key in config.given() if key.startswith("train.")}
    for name in sorted(given & trainer.unused):
        raise InputError(
            f"train.{name}={getattr(config.train, name)!r}: {config.recommender} has no use for it; leave it out"
        )
    changes = {f"train.{name}": value for name, value in trainer.defaults.items() if name not in given}
    dataset = Dataset.open(Workspace.open(config.workspace))
    check_data(config, dataset)
    if trainer.reads_memory:
        config = with_snapshot(config)
    return TrainingPlan(config.replace(changes), trainer, dataset)


def train(plan: TrainingPlan, report: Report = lambda _: None) -> TrainingRecord:
    """Train, or finish training, and return the record. A training that has ended is not run again.

    Raises InputError if there are no training or validation samples, if the loss is not finite, if the checkpoint is
    damaged, or if the folder holds another training.
    """
    done = plan.finished()
    if done is None:
        data, valid = TrainingData.read(plan.dataset, plan.config.train.on_valid), _validation_samples(plan)
        progress = _run(plan, data, valid, report)
        done = _finish(plan, data, len(valid), progress)
    _clean(plan, done)
    return done


def _validation_samples(plan: TrainingPlan) -> list[Sample]:
    samples = choose_samples(plan.dataset, Split.VALID, plan.config.train.valid_samples)
    if not samples:
        where = plan.workspace.path("dataset")
        raise InputError(f"{where}: has 0 validation samples; prepare the data with another data.split")
    return samples


def _run(plan: TrainingPlan, data: TrainingData, valid: Sequence[Sample], report: Report) -> Progress:
    """Run the epochs that are due, with a checkpoint after each."""
    config, progress = plan.config, Progress(keep_last=plan.config.train.on_valid)
    learner = plan.trainer.learner(config, data)
    if plan.workspace.exists(plan.checkpoint):
        progress = _restore(plan, learner)
    report(progress.history)

    def save() -> None:
        _save(plan, learner, progress)
        report(progress.history)

    fit(learner, config.train, lambda one: mean_ndcg(one, valid, config.recommend.exclude_seen), progress, save)
    return progress


def _save(plan: TrainingPlan, learner: Learner, progress: Progress) -> None:
    tensors = learner.state() | {f"{BEST}{name}": weight for name, weight in progress.best.items()}
    history = json.dumps([epoch.model_dump() for epoch in progress.history])
    from safetensors.torch import save

    content = save(tensors, metadata={"history": history})
    with plan.workspace.create(plan.checkpoint) as stream:
        stream.write(content)


def _restore(plan: TrainingPlan, learner: Learner) -> Progress:
    """Bring a learner into the state of the checkpoint. Raises InputError if that is damaged."""
    location = plan.workspace.path(plan.checkpoint)
    content = plan.workspace.storage.read(location)
    tensors = load_tensors(content, location, "delete it and run the same command again")
    size = int.from_bytes(content[:8], "little")  # the header's, which safetensors reads from files only
    history = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["history"])
    best = {name.removeprefix(BEST): tensor for name, tensor in tensors.items() if name.startswith(BEST)}
    learner.restore({name: tensor for name, tensor in tensors.items() if not name.startswith(BEST)})
    return Progress([Epoch(**epoch) for epoch in history], best, plan.config.train.on_valid)


def _finish(plan: TrainingPlan, data: TrainingData, valid: int, progress: Progress) -> TrainingRecord:
    """Write the weights of the best epoch, and the record last. Of two equal trainings in a race, one wins."""
    name = plan.config.recommender
    file, checksum = write_weights(plan.workspace, name, progress.best)
    record = TrainingRecord(
        run=plan.run,
        recommender=name,
        settings=plan.settings,
        train=plan.config.train,
        dataset=plan.dataset.digest,
        items=data.num_items,
        samples=plan.settings.get(ROWS, data.samples),
        valid_samples=valid,
        best_epoch=progress.best_epoch,
        history=progress.history,
        seconds=round(sum(epoch.seconds for epoch in progress.history), 3),
        weights=file,
        sha256=checksum,
    )
    try:
        record.write(plan.workspace, record_of(name))
    except FileExistsError:
        return plan.finished() or record
    return record


def _clean(plan: TrainingPlan, record: TrainingRecord) -> None:
    """Delete the checkpoint, and weights that a killed attempt left."""
    folder = folder_of(record.recommender)
    plan.workspace.delete(plan.checkpoint.rpartition("/")[0])
    for path in plan.workspace.files(folder, ".safetensors"):
        if path != f"{folder}/{record.weights}":
            plan.workspace.delete(path)

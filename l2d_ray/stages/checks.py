"""Checks of the jobs: what can be known to be wrong without Ray and without a model, within seconds.

One function per job, from its configuration to nothing. Each raises InputError as the job would, only earlier.
"""

from collections.abc import Sequence
from pathlib import Path

from l2d_ray.config import Config, ModelConfig
from l2d_ray.data.additions import read_new_items
from l2d_ray.data.dataset import MANIFEST, Dataset
from l2d_ray.data.sources import check_source
from l2d_ray.errors import InputError
from l2d_ray.models.checkpoint import find_adapter, find_model
from l2d_ray.recommenders.contract import MODEL_NEEDS
from l2d_ray.recommenders.registry import NamedRecommender, find
from l2d_ray.stages.erasure import Selection
from l2d_ray.stages.settings import MEMORY, check_data, for_append, for_evaluation, for_index, for_items, for_memory
from l2d_ray.workspace import Workspace


def prepare(config: Config) -> None:
    """Check the settings of the data source, that the raw files exist, and their first rows.

    With data.append=true, also that there is a dataset which can grow.
    """
    workspace = Workspace.open(config.workspace)
    check_source(for_append(config, Dataset.open(workspace)) if config.data.append else config)


def add_items(config: Config) -> None:
    """Check that there is a memory of the dataset, and that the new items can be added to it."""
    from l2d_ray.stages.index_plan import dataset_of, plan_index

    dataset_of(plan_index(for_index(config)))
    dataset = Dataset.open(Workspace.open(config.workspace))
    read_new_items(for_items(config, dataset), dataset.items())
    _check_model(for_memory(config).model)


def finetune(config: Config) -> None:
    """Check that there is a dataset, and a base model if it is on this machine, and that the settings fit together."""
    check_data(config, Dataset.open(Workspace.open(config.workspace)))
    check_training(config)
    _check_model(config.model)


def build_memory(config: Config) -> None:
    """Check that there is a dataset, and a model if it is on this machine, as the workspace's record has them."""
    config = for_memory(config)
    check_data(config, Dataset.open(Workspace.open(config.workspace)))
    _check_model(config.model)


def build_index(config: Config) -> None:
    """Check that there is a memory, and that the FAISS factory string is one."""
    from l2d_ray.stages.index_plan import plan_index

    plan_index(for_index(config))


def evaluate(config: Config) -> None:
    """Check the recommenders' names, and that there is a dataset, a memory if one is needed, and a local model."""
    from l2d_ray.stages.index_plan import plan_index

    config = for_evaluation(config)
    recommenders = [find(name, config, "evaluate.recommenders") for name in config.evaluate.recommenders]
    dataset = Dataset.open(Workspace.open(config.workspace))
    check_data(config, dataset)
    for recommender in recommenders:
        recommender.options.check(dataset, test=[])
    if any(recommender.options.indexes for recommender in recommenders):
        plan_index(config)
    _check_model(config.model)


def compare(config: Config) -> None:
    """Check the names of the recommenders, the dataset or else the raw files, and what trains and runs the model."""
    recommenders = [find(name, config, "evaluate.recommenders") for name in config.evaluate.recommenders]
    workspace = Workspace.open(config.workspace)
    if workspace.exists(MANIFEST):
        check_data(config, Dataset.open(workspace))
    else:
        check_source(config)
    if finetuning_is_due(config, recommenders):
        check_training(config)
    _check_model(config.model)


def finetuning_is_due(config: Config, recommenders: Sequence[NamedRecommender]) -> bool:
    """Return whether a comparison must fine-tune first: the model is needed, and neither given as tuned nor there."""
    workspace, given = Workspace.open(config.workspace), config.given()
    folders = [config.finetune.name] if "finetune.name" in given else workspace.folders()
    there = [MEMORY, "memory/snapshots", *(f"{folder}/training.json" for folder in folders)]
    needed = any(one.needs & MODEL_NEEDS for one in recommenders)
    return needed and "model.adapter" not in given and not any(map(workspace.exists, there))


def compact(config: Config) -> None:
    """Check that there is a dataset."""
    Dataset.open(Workspace.open(config.workspace))


def erase(config: Config) -> None:
    """Check that something to erase is named, that the files can be read, and that there is a dataset."""
    Selection.read(config.erase)
    Dataset.open(Workspace.open(config.workspace))


def train(config: Config) -> None:
    """Check that there is a dataset, that the recommender can be trained, and that its folder is free."""
    from l2d_ray.stages.training import plan_training

    plan_training(config).finished()


def tune(config: Config) -> None:
    """Check that there is a dataset, and that the recommender can be trained."""
    from l2d_ray.stages.training import plan_training

    plan_training(config)


def check_training(config: Config) -> None:
    """Raise InputError for settings of a training that cannot work together."""
    finetuning, gpu = config.finetune, config.device == "cuda"
    if config.model.adapter:
        raise InputError(
            f"model.adapter={config.model.adapter!r}: fine-tuning starts from a base model; leave the adapter out"
        )
    if finetuning.offload and (not gpu or finetuning.zero_stage == 0):
        raise InputError(
            f"finetune.offload=true with finetune.zero_stage={finetuning.zero_stage} and workers.gpus="
            f"{config.workers.gpus:g}: it moves the shards of ZeRO 1 to 3 from GPUs to the CPU's memory; leave it out"
        )
    if config.workers.gpus not in (0, 1):
        raise InputError(
            f"workers.gpus={config.workers.gpus:g}: a training worker has one GPU; set 1, and workers.max to their"
            " number"
        )
    if finetuning.vocabulary == "catalogue" and (finetuning.zero_stage == 3 or "lm_head" in finetuning.target_modules):
        reason = "finetune.zero_stage=3" if finetuning.zero_stage == 3 else "'lm_head' in finetune.target_modules"
        raise InputError(
            f"finetune.vocabulary='catalogue' with {reason}: it reads rows of the output layer's weights, which must be"
            " whole and without LoRA; set finetune.vocabulary=all"
        )
    if config.model.dtype in ("float16", "int8") and not gpu:
        raise InputError(f"model.dtype={config.model.dtype!r}: a CPU cannot train in it; use float32")
    if config.model.dtype == "float16" and finetuning.zero_stage == 0:
        # It divides gradients by a scale that the loss never had: https://github.com/deepspeedai/DeepSpeed/pull/8393
        raise InputError("model.dtype='float16' with finetune.zero_stage=0: DeepSpeed needs stage 1 to 3; set 1")


def _check_model(model: ModelConfig) -> None:
    """Raise InputError if a model or adapter on this machine is missing or incomplete. Others are found later."""
    if Path(model.name).is_absolute():
        find_model(model)
    if model.adapter and Path(model.adapter).is_absolute():
        find_adapter(model)

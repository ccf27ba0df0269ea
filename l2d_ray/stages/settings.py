"""Settings that the jobs record in the workspace, so that later jobs need only its name.

    dataset/dataset.json    data.*, by jobs/prepare_data.py
    <adapter>/training.json model.*, prompt.* and history.*, by jobs/finetune.py
    memory/settings.json    model.*, prompt.*, history.* and memory.*, by jobs/build_memory.py
    index/settings.json     index.* and recommend.*, by jobs/build_index.py

A setting that is not given is taken from the record. A given one that contradicts the record is refused by name where
it decides numbers, and taken where it chooses among what the workspace holds.
"""

from contextlib import suppress
from typing import Any

from l2d_ray.config import (
    Config,
    HistoryConfig,
    IndexConfig,
    MemoryConfig,
    ModelConfig,
    PromptConfig,
    RecommendConfig,
    flatten,
)
from l2d_ray.data.dataset import Dataset
from l2d_ray.data.files import file_name, join
from l2d_ray.data.sources import PublishedSource, source_of
from l2d_ray.errors import InputError
from l2d_ray.records import Record
from l2d_ray.stages.finetuning import Training
from l2d_ray.workspace import Workspace

MEMORY, INDEX, TRAINING = "memory/settings.json", "index/settings.json", "training.json"
HERE = "{workspace}"
"""Stands in a record for the workspace's location, so that a workspace can be moved."""
IRRELEVANT_DATA = {"data.interactions", "data.items", "data.num_blocks", "data.append"}
"""Settings of the preparation that may differ: where the raw files were, and how the work was divided."""
DELIVERY = IRRELEVANT_DATA | {"data.since", "data.until"}
"""Settings of the preparation that belong to the files, so that they may differ when a dataset grows."""
TITLES = ("data.columns.", "data.max_title_words")
"""Settings of the preparation that say how titles are read and judged."""
HOW_TO_GROW = "index.max_drift", "index.max_segments"
"""Settings of one run of jobs/build_index.py, which do not choose among indexes."""


class MemorySettings(Record):
    """Settings that a memory is made with."""

    history: HistoryConfig
    prompt: PromptConfig
    model: ModelConfig
    memory: MemoryConfig
    trained_from: str | None = None
    """The model.name that was fine-tuned as a whole to `model.name`, if it was."""


class IndexSettings(Record):
    """Settings of the index that jobs/build_index.py built last."""

    index: IndexConfig
    recommend: RecommendConfig


def check_data(config: Config, dataset: Dataset) -> None:
    """Raise InputError if a given data.* setting is not the one that the dataset was prepared with."""
    recorded = flatten({"data": dataset.manifest.get("data", {})})
    decisive = {key: value for key, value in recorded.items() if key not in IRRELEVANT_DATA}
    path = dataset.workspace.path("dataset/dataset.json")
    _refuse(config.given(), decisive, path, "run jobs/prepare_data.py with this value first")


def for_append(config: Config, dataset: Dataset) -> Config:
    """Return the settings to append to a dataset with: those not given are the ones that it was prepared with.

    Raises InputError for given settings that contradict these, and for a dataset that cannot grow.
    """
    recorded = flatten({"data": dataset.manifest.get("data", {})})
    path, given = dataset.workspace.path("dataset/dataset.json"), config.given()
    decisive = {key: value for key, value in recorded.items() if key not in DELIVERY}
    _refuse(given, decisive, path, "prepare a dataset with this value in another workspace")
    recorded.pop("data.num_blocks", None)
    config = _fill(config, given, recorded)
    data, source = config.data, source_of(config)
    if data.split != "none" or data.max_users is not None or isinstance(source, PublishedSource):
        raise InputError(
            f"data.append=true: {path} records data.source={data.source!r}, data.split={data.split!r}, data.max_users="
            f"{data.max_users}; only data.split=none without data.max_users or a published split grows: prepare it so"
        )
    return config


def for_items(config: Config, dataset: Dataset) -> Config:
    """Return the settings to read added items with: columns that are not given are those of the dataset."""
    recorded = flatten({"data": dataset.manifest.get("data", {})})
    return _fill(config, config.given(), {key: recorded[key] for key in recorded if key.startswith(TITLES)})


def for_memory(config: Config) -> Config:
    """Return the settings to build a memory with.

    Those not given are from the memory that was begun, else from the workspace's fine-tuned model, which is then the
    model. Raises InputError for given settings that contradict these, and for a fine-tuned model newer than the memory.
    """
    workspace = Workspace.open(config.workspace)
    if workspace.exists(MEMORY):
        record = MemorySettings.read(workspace, MEMORY)
        _check_is_of_training(config, workspace, record)
        return _with_memory(config, workspace, record, strict=("history.", "prompt.", "model.", "memory.num_shards"))
    return _with_model(config, workspace)


def for_index(config: Config) -> Config:
    """Return the settings to build an index with: those not given are of the index that was built last.

    A new index is of the newest snapshot unless index.snapshot is given.
    """
    return _with_index(config, Workspace.open(config.workspace), pinned=False)


def for_evaluation(config: Config) -> Config:
    """Return the settings to evaluate with: those of the memory, and of the index that was built last.

    Without a memory, the model is as in `for_memory`. Raises InputError for given settings that contradict the record.
    """
    return for_index(_with_model(config, Workspace.open(config.workspace)))


def for_titles(config: Config) -> Config:
    """Return the settings to compute states of titles with: those of the memory, else of the fine-tuned model.

    Raises InputError for given settings that contradict these.
    """
    return _with_model(config, Workspace.open(config.workspace))


def for_queries(config: Config) -> Config:
    """Return the settings to recommend with: those of the memory, and the index that was built last.

    Raises InputError for given settings that contradict the memory's.
    """
    workspace = Workspace.open(config.workspace)
    return _with_index(_with_model(config, workspace), workspace, pinned=True)


def record_memory(config: Config, dtype: str) -> None:
    """Record the settings that decide a memory, with the number format that `model.dtype` stands for."""
    workspace, model = Workspace.open(config.workspace), config.model
    name, adapter = (_portable(location, workspace) for location in (model.name, model.adapter))
    base = next((base for location, base in _trainings(workspace).items() if location == model.name), None)
    record = MemorySettings(
        history=config.history,
        prompt=config.prompt,
        model=ModelConfig(name=str(name), adapter=adapter, num_layers=model.num_layers, dtype=dtype),
        memory=config.memory,
        trained_from=_portable(base, workspace),
    )
    workspace.write_json(MEMORY, record.model_dump(mode="json"))


def record_index(config: Config, snapshot: int) -> None:
    """Record the settings of an index, with the number of the snapshot that was indexed."""
    index = config.replace({"index.snapshot": snapshot}).index
    record = IndexSettings(index=index, recommend=config.recommend)
    Workspace.open(config.workspace).write_json(INDEX, record.model_dump(mode="json"))


def _with_model(config: Config, workspace: Workspace) -> Config:
    """Fill in the settings of the memory; without one, of the fine-tuned model."""
    if workspace.exists(MEMORY):
        record = MemorySettings.read(workspace, MEMORY)
        return _with_memory(config, workspace, record, strict=("history.", "prompt.", "model."))
    if workspace.exists("memory/snapshots"):  # made before settings were recorded: its identity decides
        return config
    return _with_training(config, workspace)


def _with_memory(config: Config, workspace: Workspace, record: MemorySettings, strict: tuple[str, ...]) -> Config:
    """Fill in the settings of a memory. Its model may have moved: then the model's digest decides."""
    recorded = flatten(record.model_dump(mode="json", exclude={"trained_from"}))
    given, located = config.given(), ("model.name", "model.adapter")
    recorded |= {key: _there(recorded[key], workspace) for key in located}
    for key, same in (("model.name", _there(record.trained_from, workspace)), ("model.dtype", "auto")):
        if key in given and given[key] == same:
            del given[key]
    decisive = {key: value for key, value in recorded.items() if key.startswith(strict) and key not in located}
    _refuse(given, decisive, workspace.path(MEMORY), "build a memory with this value in another workspace")
    return _fill(config, given, recorded)


def _check_is_of_training(config: Config, workspace: Workspace, record: MemorySettings) -> None:
    """Raise InputError if the workspace has a fine-tuned model to use, and the memory was made with another one."""
    given, trainings = config.given(), _trainings(workspace)
    if "model.adapter" in given or given.get("model.name") in trainings:
        return
    wanted = set(trainings)
    if "finetune.name" in given:
        wanted &= {join(workspace.uri, config.finetune.name)}
    made_with = {_there(location, workspace) for location in (record.model.name, record.model.adapter)}
    if wanted and not wanted & made_with:
        raise InputError(
            f"{workspace.path(MEMORY)}: the memory was made without {', '.join(wanted)}, which was fine-tuned later;"
            " build its memory in another workspace, delete memory/ and index/, or add model.adapter=null to go on"
        )


def _with_training(config: Config, workspace: Workspace) -> Config:
    """Fill in the settings of the fine-tuned model that is given, or else of the one in the workspace."""
    location = _training_to_use(config, workspace)
    if location is None:
        return config
    of_training, given = Workspace.open(location), config.given()
    path, settings = of_training.path(TRAINING), Training.read(of_training, TRAINING).settings
    base = settings["model"]["name"]
    if "model.adapter" not in given and given.get("model.name", base) not in (base, location):
        raise InputError(
            f"model.name={config.model.name!r}: {path} is of {base!r}, fine-tuned; leave it out to use the fine-tuned"
            " model, or add model.adapter=null to use this one as it is"
        )
    recorded = flatten({part: settings[part] for part in ("model", "history", "prompt")})
    if settings["finetune"]["method"] == "full":
        recorded["model.name"] = location
        given.pop("model.name", None)
    else:
        recorded["model.adapter"] = location
    decisive = {key: recorded[key] for key in recorded if key.startswith("prompt.") or key == "model.num_layers"}
    _refuse(given, decisive, path, "add model.adapter=null to use the model as it is")
    return _fill(config, given, recorded)


def _training_to_use(config: Config, workspace: Workspace) -> str | None:
    """Return the location of the fine-tuned model that the settings mean, if any."""
    given, trainings = config.given(), _trainings(workspace)
    for key in ("model.adapter", "model.name"):
        if given.get(key) and _is_training(given[key]):
            return str(given[key])
    if "model.adapter" in given:
        return None
    if "finetune.name" in given:
        location = join(workspace.uri, config.finetune.name)
        return location if location in trainings else None
    if len(trainings) > 1:
        names = ", ".join(map(file_name, trainings))
        raise InputError(f"{workspace.uri}: holds several fine-tuned models ({names}); name one with finetune.name")
    return next(iter(trainings), None)


def _is_training(location: str) -> bool:
    """Return whether jobs/finetune.py made the model there, perhaps in another workspace."""
    with suppress(InputError):  # no folder can be there
        return Workspace.open(location).exists(TRAINING)
    return False


def _trainings(workspace: Workspace) -> dict[str, str]:
    """Return the base model of each fine-tuned model in the workspace, by its location."""
    paths = {name: f"{name}/{TRAINING}" for name in workspace.folders()}
    return {
        join(workspace.uri, name): Training.read(workspace, path).settings["model"]["name"]
        for name, path in paths.items()
        if workspace.exists(path)
    }


def _with_index(config: Config, workspace: Workspace, pinned: bool) -> Config:
    """Fill in the settings of the index that was built last; its snapshot only if `pinned`."""
    if not workspace.exists(INDEX):
        return config
    recorded, given = flatten(IndexSettings.read(workspace, INDEX).model_dump(mode="json")), config.given()
    for key in HOW_TO_GROW if pinned else (*HOW_TO_GROW, "index.snapshot"):
        del recorded[key]
    if given.get("index.space", recorded["index.space"]) != recorded["index.space"]:
        del recorded["index.prior"]  # was chosen for the recorded space
    return _fill(config, given, recorded)


def _fill(config: Config, given: dict[str, Any], recorded: dict[str, Any]) -> Config:
    return config.replace({key: value for key, value in recorded.items() if key not in given})


def _refuse(given: dict[str, Any], recorded: dict[str, Any], path: str, alternative: str) -> None:
    """Raise InputError if given settings differ from the recorded ones."""
    wrong = [key for key in recorded if key in given and given[key] != recorded[key]]
    if wrong:
        settings = ", ".join(f"{key}={given[key]!r}" for key in wrong)
        values = ", ".join(repr(recorded[key]) for key in wrong)
        raise InputError(f"{settings}: {path} records {values}; leave {', '.join(wrong)} out, or {alternative}")


def _portable(location: str | None, workspace: Workspace) -> str | None:
    """Return a location such that it stays right if the workspace, with the model in it, is moved."""
    if location and location == join(workspace.uri, file_name(location)):
        return f"{HERE}/{file_name(location)}"
    return location


def _there(location: str | None, workspace: Workspace) -> str | None:
    """Undo `_portable`."""
    if location and location.startswith(f"{HERE}/"):
        return join(workspace.uri, location.removeprefix(f"{HERE}/"))
    return location

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.growing import prepare
from support.small_workspace import write_dataset

from l2d_ray.command_line import load_config
from l2d_ray.config import Config
from l2d_ray.data.dataset import Dataset, write_manifest
from l2d_ray.errors import InputError
from l2d_ray.stages.finetuning import Training, settings_of
from l2d_ray.stages.settings import (
    check_data,
    for_append,
    for_evaluation,
    for_index,
    for_memory,
    for_queries,
    record_index,
    record_memory,
)
from l2d_ray.workspace import Workspace


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "ws").mkdir()
    return tmp_path / "ws"


def config(folder: Path, **given: Any) -> Config:
    return load_config([f"workspace={folder}", *(f"{key.replace('__', '.')}={value}" for key, value in given.items())])


def finetune(folder: Path, name: str = "adapter", **settings: Any) -> None:
    """Leave what fine-tuning leaves, without the weights."""
    trained = config(folder, finetune__name=name, **settings)
    counts = dict.fromkeys(("samples", "distinct_tokens", "tokens_one_by_one", "epochs", "best_epoch"), 1)
    floats = dict.fromkeys(("train_loss", "valid_loss", "seconds"), 1.0)
    training = Training(run="r", settings=settings_of(trained), losses=[], curve=[], **counts, **floats)
    training.write(Workspace.open(str(folder)), f"{name}/training.json")


def refused(function: Any, *arguments: Any) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments)
    return str(caught.value)


def test_without_records_the_settings_are_those_given(folder: Path) -> None:
    given = config(folder, history__stride=3, index__space="none")
    for take in (for_memory, for_index, for_evaluation, for_queries):
        assert take(given) == given


def test_queries_take_the_settings_of_the_memory(folder: Path) -> None:
    record_memory(config(folder, history__stride=40, prompt__suffix="Next:", model__num_layers=3), "float32")
    found = for_queries(config(folder, workers__cpus=2, memory__units=7, evaluate__samples=3))
    assert (found.history.stride, found.prompt.suffix, found.model.num_layers) == (40, "Next:", 3)
    assert (found.model.dtype, found.model.name) == ("float32", "demo")
    assert (found.workers.cpus, found.memory.units, found.evaluate.samples) == (2, 7, 3)
    assert for_queries(found) == found


def test_what_contradicts_the_memory_is_refused_by_name(folder: Path) -> None:
    record_memory(config(folder, history__stride=40), "float32")
    for take in (for_memory, for_evaluation, for_queries):
        assert refused(take, config(folder, history__stride=10, model__dtype="bfloat16")) == (
            f"history.stride=10, model.dtype='bfloat16': {folder}/memory/settings.json records 40, 'float32'; leave"
            " history.stride, model.dtype out, or build a memory with this value in another workspace"
        )
        take(config(folder, history__stride=40, model__dtype="auto"))
    assert refused(for_memory, config(folder, memory__num_shards=5)).startswith("memory.num_shards=5: ")
    for_queries(config(folder, memory__num_shards=5))  # does not matter there


def test_more_of_the_same_memory_may_be_built(folder: Path) -> None:
    record_memory(config(folder, memory__units=8, memory__sample_fraction=0.5), "float32")
    assert for_memory(config(folder)).memory.units == 8
    assert for_memory(config(folder)).memory.sample_fraction == 0.5
    assert for_memory(config(folder, memory__sample_fraction=1)).memory.sample_fraction == 1


def test_a_model_that_was_moved_is_named_and_its_digest_decides(folder: Path) -> None:
    record_memory(config(folder, model__name="/old/model"), "float32")
    assert for_queries(config(folder)).model.name == "/old/model"
    assert for_queries(config(folder, model__name="/new/model")).model.name == "/new/model"


def test_the_fine_tuned_adapter_is_the_model_of_the_memory(folder: Path) -> None:
    finetune(folder, history__stride=40, model__name="org/base", model__num_layers=2)
    found = for_memory(config(folder))
    assert (found.model.name, found.model.adapter) == ("org/base", str(folder / "adapter"))
    assert (found.history.stride, found.model.num_layers) == (40, 2)
    assert for_memory(found) == found
    assert for_memory(config(folder, model__name="org/base")).model.adapter == str(folder / "adapter")
    assert for_memory(config(folder, history__stride=1)).history.stride == 1  # a memory may have another window
    assert for_memory(config(folder, model__adapter="null")).model.name == "demo"
    assert for_memory(config(folder, model__adapter="org/other")).model.adapter == "org/other"
    assert for_evaluation(config(folder)).model == found.model


def test_the_model_that_was_tuned_as_a_whole_is_the_model_of_the_memory(folder: Path) -> None:
    finetune(folder, finetune__method="full", model__name="org/base", model__num_layers=2)
    for given in ({}, {"model__name": "org/base"}, {"model__name": folder / "adapter"}):
        found = for_memory(config(folder, **given))
        assert (found.model.name, found.model.adapter) == (str(folder / "adapter"), None)
    record_memory(found, "float32")
    for take in (for_memory, for_queries):
        assert take(config(folder, model__name="org/base")).model.name == str(folder / "adapter")
    assert for_memory(config(folder, model__adapter="null", model__name="org/base")).model.name == str(
        folder / "adapter"
    )


@pytest.mark.parametrize(("method", "key"), [("full", "model__name"), ("lora", "model__adapter")])
def test_a_model_of_another_workspace_brings_its_settings(folder: Path, tmp_path: Path, method: str, key: str) -> None:
    other = tmp_path / "other"
    finetune(other, finetune__method=method, model__name="org/base", model__num_layers=2, history__stride=40)
    found = for_memory(config(folder, **{key: other / "adapter"}))
    assert (found.history.stride, found.model.num_layers) == (40, 2)
    expected = (str(other / "adapter"), None) if method == "full" else ("org/base", str(other / "adapter"))
    assert (found.model.name, found.model.adapter) == expected
    assert for_memory(config(folder, history__stride=1, **{key: other / "adapter"})).history.stride == 1
    assert refused(for_memory, config(folder, prompt__suffix="x", **{key: other / "adapter"})).startswith(
        f"prompt.suffix='x': {other}/adapter/training.json records ''; "
    )
    for location in ("org/name", "s4://bucket/name"):
        assert for_memory(config(folder, model__name=location)).model.name == location


def test_what_contradicts_the_fine_tuned_model_is_refused_by_name(folder: Path) -> None:
    finetune(folder, model__name="org/base")
    path = f"{folder}/adapter/training.json"
    assert refused(for_memory, config(folder, model__name="org/other")) == (
        f"model.name='org/other': {path} is of 'org/base', fine-tuned; leave it out to use the fine-tuned model, or add"
        " model.adapter=null to use this one as it is"
    )
    assert refused(for_memory, config(folder, prompt__suffix="x")) == (
        f"prompt.suffix='x': {path} records ''; leave prompt.suffix out, or add model.adapter=null to use the model as"
        " it is"
    )


def test_one_of_several_fine_tuned_models_is_named(folder: Path) -> None:
    finetune(folder, "first")
    finetune(folder, "second")
    assert refused(for_memory, config(folder)) == (
        f"{folder}: holds several fine-tuned models (first, second); name one with finetune.name"
    )
    chosen = for_memory(config(folder, finetune__name="second"))
    assert chosen.model.adapter == str(folder / "second")
    record_memory(chosen, "float32")
    assert for_memory(config(folder)).model.adapter == str(folder / "second")
    assert for_queries(config(folder, finetune__name="first")).model.adapter == str(folder / "second")
    assert refused(for_memory, config(folder, finetune__name="first")).startswith(
        f"{folder}/memory/settings.json: the memory was made without {folder}/first, which was fine-tuned later; "
    )


def test_a_memory_older_than_the_fine_tuned_model_is_not_taken_for_its(folder: Path) -> None:
    record_memory(config(folder), "float32")
    finetune(folder)
    assert refused(for_memory, config(folder)) == (
        f"{folder}/memory/settings.json: the memory was made without {folder}/adapter, which was fine-tuned later;"
        " build its memory in another workspace, delete memory/ and index/, or add model.adapter=null to go on"
    )
    assert for_memory(config(folder, model__adapter="null")).model.adapter is None
    assert for_queries(config(folder)).model.adapter is None


def test_a_memory_without_a_record_is_used_with_the_settings_given(folder: Path) -> None:
    finetune(folder)
    (folder / "memory/snapshots").mkdir(parents=True)
    for take in (for_memory, for_evaluation, for_queries):
        assert take(config(folder, history__stride=3)) == config(folder, history__stride=3)


def test_a_workspace_may_be_moved_with_the_model_in_it(folder: Path, tmp_path: Path) -> None:
    finetune(folder)
    record_memory(for_memory(config(folder)), "float32")
    moved = tmp_path / "moved"
    shutil.move(folder, moved)
    assert for_queries(config(moved)).model.adapter == str(moved / "adapter")
    assert "{workspace}/adapter" in (moved / "memory/settings.json").read_text()


def test_queries_use_the_index_that_was_built_last(folder: Path) -> None:
    record_index(config(folder, index__space="none", index__prior=0.5, recommend__top_m=20), 2)
    found = for_queries(config(folder))
    assert (found.index.space, found.index.prior, found.index.snapshot) == ("none", 0.5, 2)
    assert found.recommend.top_m == 20
    assert for_queries(config(folder, index__snapshot=1, index__prior=1)).index.prior == 1
    other = for_queries(config(folder, index__space="centre"))
    assert (other.index.space, other.index.prior, other.index.snapshot) == ("centre", None, 2)


def test_the_next_index_is_of_the_newest_snapshot(folder: Path) -> None:
    record_index(config(folder, index__space="none"), 2)
    for take in (for_index, for_evaluation):
        assert (take(config(folder)).index.space, take(config(folder)).index.snapshot) == ("none", None)
    assert for_index(config(folder, index__snapshot=2)).index.snapshot == 2


def test_a_setting_of_the_data_that_contradicts_the_dataset_is_refused(folder: Path) -> None:
    write_dataset(folder, users=3)
    dataset = Dataset.open(Workspace.open(str(folder)))
    check_data(config(folder, data__min_interactions=2), dataset)  # nothing recorded
    prepared = config(folder, data__min_interactions=3, data__since="2020-01-02")
    about = {"data": prepared.data.model_dump(mode="json")}
    parts = [(part, 0) for part in dataset.parts]
    write_manifest(dataset.workspace, dataset.items(), parts, about)
    dataset = Dataset.open(dataset.workspace)
    check_data(prepared, dataset)
    check_data(config(folder, data__num_blocks=9, data__interactions="elsewhere"), dataset)
    assert refused(check_data, config(folder, data__min_interactions=2, data__since="2020-01-03"), dataset) == (
        f"data.min_interactions=2, data.since='2020-01-03': {folder}/dataset/dataset.json records 3, '2020-01-02';"
        " leave data.min_interactions, data.since out, or run jobs/prepare_data.py with this value first"
    )


def test_a_damaged_record_names_the_job_that_writes_it(folder: Path) -> None:
    record_index(config(folder), 1)
    path = folder / "index/settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"surprise": 1}))
    assert refused(for_queries, config(folder)).startswith(
        f"{path}: surprise: Extra inputs are not permitted; the file"
    )


def test_a_dataset_grows_with_the_settings_that_it_was_prepared_with(tmp_path: Path) -> None:
    dataset = prepare(tmp_path, [("u", "a", 1), ("u", "b", 2)], {"a": "Title a", "b": "Title b"})
    given = config(tmp_path, data__append=True, data__interactions=str(tmp_path / "new.csv"), data__since="2020-01-02")
    found = for_append(given, dataset).data
    assert (found.split, found.min_interactions, found.source) == ("none", 1, "demo")
    assert (found.append, found.interactions, str(found.since)) == (True, str(tmp_path / "new.csv"), "2020-01-02")
    assert refused(for_append, config(tmp_path, data__append=True, data__min_interactions=2), dataset) == (
        f"data.min_interactions=2: {tmp_path}/dataset/dataset.json records 1; leave data.min_interactions out, or"
        " prepare a dataset with this value in another workspace"
    )
    check_data(config(tmp_path, data__append=True), dataset)


@pytest.mark.parametrize(
    "data", [{"split": "time"}, {"max_users": 3, "split": "none"}, {"source": "d3", "split": "none"}]
)
def test_a_dataset_with_a_split_or_a_choice_of_users_does_not_grow(tmp_path: Path, data: dict[str, object]) -> None:
    dataset = prepare(tmp_path, [("u", "a", 1)], {"a": "Title a"})
    dataset.manifest["data"] |= {"interactions": str(tmp_path)} | data
    problem = refused(for_append, config(tmp_path, data__append=True), dataset)
    assert problem.startswith(f"data.append=true: {tmp_path}/dataset/dataset.json records data.source=")
    assert problem.endswith("only data.split=none without data.max_users or a published split grows: prepare it so")

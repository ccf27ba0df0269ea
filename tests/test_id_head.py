"""The ID head: what it learns from a memory, what it leaves, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.sequences import loaded, trained
from support.small_workspace import ITEM_COUNT, build_units, config_of, write_dataset
from support.tiny_models import save_adapter, save_tiny

from l2d_ray.config import Config
from l2d_ray.core.query import Query
from l2d_ray.errors import InputError
from l2d_ray.memory.store import MemoryStore
from l2d_ray.recommenders.id_head import Head, IdHead
from l2d_ray.recommenders.memory_rows import MemoryRows, identify_states
from l2d_ray.stages.evaluation import plan_evaluation
from l2d_ray.stages.training import plan_training
from l2d_ray.workspace import Workspace

USERS = 20
QUICK = {
    "recommender": "id-head",
    "memory.units": 2,
    "train.epochs": 4,
    "train.batch_size": 32,
    "train.learning_rate": 0.03,
}
RECORD = "WS/recommenders/id-head/training.json"


def with_memory(folder: Path, users: int = USERS) -> Config:
    """Write a dataset and the newest snapshot of its memory. Return settings that train a head on it."""
    dataset = write_dataset(folder, users)
    config = config_of(folder, **QUICK)
    units = [record.unit for record in build_units(config)]
    MemoryStore(Workspace.open(str(folder))).take_snapshot(units, dataset.digest, 1.0)
    return config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return with_memory(tmp_path)


@pytest.fixture
def rows() -> MemoryRows:
    random = np.random.default_rng(0)
    states = random.standard_normal((50, 3)) * [1, 100, 0] + [0, 50, 7]
    return MemoryRows(states.astype(np.float16), random.integers(0, 4, 50))


def started(rows: MemoryRows) -> Head:
    head = Head(num_items=5, dimension=3, dropout=0.5)
    head.start(rows)
    return head


def refused(function: Any, config: Config) -> str:
    with pytest.raises(InputError) as caught:
        function(config)
    return str(caught.value).replace(config.workspace, "WS")


def test_a_head_starts_at_the_frequencies_of_the_items(rows: MemoryRows) -> None:
    weight_ID, bias_I = started(rows).folded()
    counts = np.bincount(rows.items_N, minlength=5)
    assert not weight_ID.any()
    np.testing.assert_allclose(np.exp(bias_I), (counts + 1) / 55, rtol=1e-5)


def test_centre_and_scale_fold_into_the_linear_map(rows: MemoryRows) -> None:
    head = started(rows).eval()
    torch.nn.init.normal_(head.linear.weight)
    states = rows.states_ND.astype(np.float32)
    weight_ID, bias_I = head.folded()
    with torch.inference_mode():
        expected = head(torch.from_numpy(states))
    np.testing.assert_allclose(states @ weight_ID.T + bias_I, expected, rtol=1e-3, atol=1e-3)


def test_a_head_learns_the_items_that_came_next(config: Config) -> None:
    record = trained(config.replace({"train.epochs": 40, "train.patience": 40, "train.dropout": 0}))
    first, last = record.history[0].loss, record.history[-1].loss
    assert last < 0.5 * first
    assert record.samples == USERS * 9


def test_logits_are_those_of_the_state_that_l2d_searches_with(config: Config) -> None:
    trained(config)
    head = loaded(config)
    assert isinstance(head, IdHead)
    history = np.array([3, 1, 4], np.int32)
    (found,) = head.recommend([Query.after(history, ITEM_COUNT, exclude_seen=False)])
    scores = head.encode([history]).states_UD[0] @ head.weight_ID.T + head.bias_I
    np.testing.assert_allclose(found.scores_I, np.sort(scores)[::-1], rtol=1e-5)
    assert found.items_I.tolist() == np.argsort(-scores, kind="stable").tolist()


def test_a_training_that_was_killed_ends_with_the_same_weights(config: Config, tmp_path: Path) -> None:
    def kill(history: Any) -> None:
        if len(history) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(config, kill)
    epochs: list[int] = []
    resumed = trained(config, lambda history: epochs.append(len(history)))
    assert epochs == [2, 3, 4]
    whole = trained(config.replace({"recommender": "id-head-2"}))
    assert resumed.sha256 == whole.sha256
    assert [epoch.loss for epoch in resumed.history] == [epoch.loss for epoch in whole.history]


def test_the_record_names_the_model_and_the_snapshot(config: Config) -> None:
    record = trained(config)
    snapshot = MemoryStore(Workspace.open(config.workspace)).snapshot()
    states = identify_states(config)
    assert states["memory.base_model"] == snapshot.identity.base_model[:12]
    about = {"snapshot": 1, "snapshot_digest": snapshot.digest()[:12], "rows": USERS * 9}
    expected = states | {f"memory.{name}": value for name, value in about.items()}
    assert {key: value for key, value in record.settings.items() if key.startswith("memory.")} == expected


def test_another_model_or_adapter_is_refused_by_name(config: Config, tmp_path: Path) -> None:
    trained(config)
    adapted = config.replace({"model.adapter": save_adapter(tmp_path / "lora", config.model.name)})
    other = config.replace({"model.name": save_tiny(tmp_path / "other", seed=1)})
    for changed, named in ((adapted, "adapter (None, now "), (other, "base_model (")):
        message = refused(loaded, changed)
        assert f".safetensors: trained with another language model: memory.{named}" in message
        assert message.endswith("delete recommenders/id-head and run jobs/train.py recommender=id-head again")
        evaluated = changed.replace({"evaluate.recommenders": ["id-head"]})
        assert refused(plan_evaluation, evaluated).startswith(f"{RECORD}: trained with another language model: memory.")
        assert refused(plan_training, changed).startswith(f"the memory was made with another {named}")


def test_a_memory_that_has_grown_does_not_replace_a_training(config: Config) -> None:
    trained(config)
    store = MemoryStore(Workspace.open(config.workspace))
    store.take_snapshot([*store.snapshot().units][:1], store.snapshot().dataset, 0.5)
    assert refused(trained, config).startswith(f"{RECORD}: belongs to another training: memory.snapshot (1, now 2), ")
    loaded(config)


def test_a_missing_or_damaged_memory_is_refused(config: Config, tmp_path: Path) -> None:
    file = next((tmp_path / "memory/data").rglob("*.parquet"))
    file.write_bytes(file.read_bytes()[:50])
    message = refused(trained, config)
    assert message.startswith("WS/memory: a file is missing or damaged (")
    assert message.endswith("); run python -m l2d_ray.memory verify WS, which names it")
    write_dataset(tmp_path / "bare", USERS)
    assert refused(trained, config_of(tmp_path / "bare", **QUICK)) == (
        "WS/memory/snapshots: no snapshot; run jobs/build_memory.py first"
    )


def test_a_loss_that_is_not_finite_is_refused(config: Config) -> None:
    message = refused(trained, config.replace({"train.learning_rate": 1e37}))
    assert message == "train.learning_rate=1e+37: the loss is not finite in epoch 1; lower it"

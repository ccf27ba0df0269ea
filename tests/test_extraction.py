from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from support.small_workspace import build_units
from support.tiny_models import needs_int8, save_tiny, tiny_tokenizer

from l2d_ray.config import Config, PromptConfig
from l2d_ray.core.packing import Prompts
from l2d_ray.core.samples import sample_ids
from l2d_ray.data.dataset import Dataset, write_manifest, write_part
from l2d_ray.encoding import HistoryEncoder, identify_memory
from l2d_ray.errors import InputError
from l2d_ray.memory.store import MemoryStore
from l2d_ray.models.backbone import load_backbone
from l2d_ray.models.hidden_states import padded_states, relative_error
from l2d_ray.records import check_query
from l2d_ray.schema import HISTORIES, ITEMS, Split, hidden_states
from l2d_ray.stages.extraction import Unit, UnitExtractor, plan_units
from l2d_ray.workspace import Workspace

NONE, TRAIN, VALID, TEST = Split
TITLES = [*(f"Title {n} of the year" for n in range(12)), "Next:\n", "七人の侍 😀", "", "x" * 10_000]


def user(number: int, items: list[int], splits: list[int]) -> dict[str, Any]:
    """Return a row of schema.HISTORIES."""
    return {
        "user_id": f"u{number}",
        "user_hash": number * 7_919 - 20_000,
        "item_indices": items,
        "timestamps": [100 * number + position for position in range(len(items))],
        "splits": splits,
    }


def random_users(count: int) -> list[dict[str, Any]]:
    """Return histories of 2 to 30 items. Some end with samples for validation and test; two are the same."""
    random = np.random.default_rng(5)
    users = []
    for number in range(count):
        items = random.integers(0, len(TITLES), random.integers(2, 31)).tolist()
        splits = [NONE, *[TRAIN] * (len(items) - 1)]
        if number % 3 and len(items) > 4:
            splits[-2:] = [VALID, TEST] if number % 3 == 1 else [TEST, TEST]
        users.append(user(number, items, splits))
    users[1] = users[0] | {"user_id": "u1", "user_hash": -3}
    return users


def write(workspace: Path, users: list[dict[str, Any]]) -> Dataset:
    """Write a dataset of these users in two parts."""
    opened = Workspace.open(str(workspace))
    items = [{"item_index": index, "item_id": f"i{index}", "title": title} for index, title in enumerate(TITLES)]
    middle = -(-len(users) // 2)
    parts = [
        write_part(opened, number, pa.Table.from_pylist(part, schema=HISTORIES))
        for number, part in enumerate((users[:middle], users[middle:]))
        if part
    ]
    write_manifest(opened, pa.Table.from_pylist(items, schema=ITEMS), parts, {})
    return Dataset.open(opened)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


def config_of(workspace: Path, model: str, **memory: Any) -> Config:
    sections = {"prompt": {"max_item_tokens": 9}, "history": {"max_items": 4, "stride": 3}, "model": {"name": model}}
    return Config(workspace=str(workspace), memory=memory, workers={"tokens_per_chunk": 64}, **sections)


def rows_of(config: Config) -> dict[int, dict[str, Any]]:
    """Return every row of the memory by its sample id. Fails if an id occurs twice."""
    store = MemoryStore(Workspace.open(config.workspace))
    found: dict[int, dict[str, Any]] = {}
    for batch in store.read(store.take_snapshot(store.units(), "d", 1.0)):
        for row, state in zip(batch.to_pylist(), hidden_states(batch), strict=True):
            assert row["sample_id"] not in found
            found[row["sample_id"]] = row | {"state": state}
    return found


def quarantined(config: Config) -> dict[int, str]:
    """Return the reason for every quarantined sample."""
    files = Path(config.workspace).glob("memory/quarantine/*/*.parquet")
    return {row["sample_id"]: row["reason"] for file in files for row in pq.read_table(file).to_pylist()}


def expected_samples(users: list[dict[str, Any]]) -> dict[int, tuple[dict[str, Any], int]]:
    """Return the user and the position of every training sample, by sample id."""
    return {
        sample_of(row, position): (row, position)
        for row in users
        for position, split in enumerate(row["splits"])
        if split == TRAIN
    }


def sample_of(row: dict[str, Any], position: int) -> int:
    """Return the id of a sample."""
    return int(sample_ids(np.array([row["user_hash"]]), np.array([position]))[0])


def states_alone(config: Config, samples: list[tuple[dict[str, Any], int]]) -> NDArray[np.float32]:
    """Return [N, D] the state of each sample, whose prompt is built by hand and run alone."""
    backbone = load_backbone(config.model)

    def tokens(text: str) -> list[int]:
        return list(backbone.tokenizer(text).input_ids)

    prompts = []
    for row, position in samples:
        start = max(0, (position - config.history.max_items) // config.history.stride * config.history.stride)
        prompt = tokens(config.prompt.prefix)
        for item in row["item_indices"][start:position]:
            prompt += tokens(TITLES[item])[: config.prompt.max_item_tokens] + tokens("\n")
        prompts.append(np.array(prompt + tokens(config.prompt.suffix), np.int32))
    return np.asarray(padded_states(backbone, Prompts.join(prompts), batch_size=1).states)


def test_a_memory_has_every_training_sample_once_with_the_state_of_its_prompt_alone(tmp_path: Path, model: str) -> None:
    users = random_users(12)
    write(tmp_path, users)
    config = config_of(tmp_path, model, units=5, num_shards=3)
    records = build_units(config)
    rows, expected = rows_of(config), expected_samples(users)
    assert rows.keys() == expected.keys()
    assert sum(record.rows for record in records) == len(expected)
    assert quarantined(config) == {}
    for sample, (row, position) in expected.items():
        found = rows[sample]
        assert found["user_hash"] == row["user_hash"]
        assert found["item_index"] == row["item_indices"][position]
        assert found["timestamp"] == row["timestamps"][position]
    alone = states_alone(config, list(expected.values()))
    packed = np.stack([rows[sample]["state"] for sample in expected]).astype(np.float32)
    assert relative_error(torch.from_numpy(packed), torch.from_numpy(alone)) < 2**-11  # a float16 has 11 bits
    assert sum(record.tokens for record in records) < sum(record.tokens_one_by_one for record in records) / 2


def test_no_validation_or_test_target_is_in_the_memory(tmp_path: Path, model: str) -> None:
    users = [user(n, [n, n + 1, 12, 13], [NONE, TRAIN, VALID, TEST]) for n in range(5)]
    write(tmp_path, users)
    config = config_of(tmp_path, model)
    build_units(config)
    assert {row["item_index"] for row in rows_of(config).values()} == {1, 2, 3, 4, 5}


def test_the_number_of_units_does_not_change_the_memory(tmp_path: Path, model: str) -> None:
    users = random_users(8)
    found = []
    for units in (1, 8):
        folder = tmp_path / str(units)
        write(folder, users)
        config = config_of(folder, model, units=units)
        assert len(build_units(config)) == units
        found.append(rows_of(config))
    assert found[0].keys() == found[1].keys()
    for sample, row in found[0].items():
        np.testing.assert_allclose(row["state"], found[1][sample]["state"], rtol=2e-3, atol=1e-3)


def test_a_smaller_share_is_a_subset_of_a_larger_one(tmp_path: Path, model: str) -> None:
    users = random_users(10)
    kept = []
    for fraction in (0.3, 0.6):
        folder = tmp_path / str(fraction)
        write(folder, users)
        config = config_of(folder, model, sample_fraction=fraction)
        build_units(config)
        kept.append(rows_of(config).keys())
    assert 0 < len(kept[0]) < len(kept[1]) < len(expected_samples(users))
    assert kept[0] < kept[1]
    for row in users:  # windows have 4 to 6 items: the first starts at item 0, the second at item 3
        for window in (range(1, 7), range(7, 10)):
            of_window = {sample_of(row, n) for n in window if n < len(row["splits"]) and row["splits"][n] == TRAIN}
            assert of_window <= kept[0] or not of_window & kept[0]


def test_samples_that_cannot_be_used_are_quarantined_with_the_reason(tmp_path: Path, model: str) -> None:
    users = [
        # Item 99 is unknown: it is the target at position 1, and then in the windows of some positions.
        user(0, [0, 99, *[1] * 8], [NONE, *[TRAIN] * 9]),
        user(1, [-1, 2, 3], [NONE, TRAIN, NONE]),
        user(2, [1, 2], [TRAIN, TRAIN]),
    ]
    write(tmp_path, users)
    config = config_of(tmp_path, model)
    records = build_units(config)
    # The window of positions 1 to 6 starts at item 0; from position 7 on, at item 3.
    unknown = [sample_of(users[0], position) for position in range(1, 7)] + [sample_of(users[1], 1)]
    assert quarantined(config) == {
        **dict.fromkeys(unknown, "unknown item"),
        sample_of(users[2], 0): "empty history",
    }
    assert rows_of(config).keys() == expected_samples(users).keys() - quarantined(config).keys()
    assert sum(record.quarantined for record in records) == 8


def test_a_prompt_longer_than_the_context_is_quarantined(tmp_path: Path) -> None:
    users = [user(0, [15] * 8, [NONE, *[TRAIN] * 7])]
    write(tmp_path / "w", users)
    encode, template = tiny_tokenizer(), PromptConfig()
    around = len(encode(template.prefix).input_ids + encode(template.suffix).input_ids)
    title = 9 + len(encode("\n").input_ids)
    model = save_tiny(tmp_path / "model", max_position_embeddings=around + 3 * title)
    tree = config_of(tmp_path / "w", model).model_dump() | {"history": {"max_items": 8, "stride": 1}}
    config = Config.model_validate(tree)
    build_units(config)
    reason = "prompt longer than the model's context"
    assert quarantined(config) == {sample_of(users[0], position): reason for position in range(4, 8)}
    assert rows_of(config).keys() == {sample_of(users[0], position) for position in range(1, 4)}


def test_an_empty_prompt_is_quarantined(tmp_path: Path, model: str) -> None:
    users = [user(0, [14, 14, 1], [NONE, TRAIN, TRAIN])]  # the title of item 14 is empty
    write(tmp_path, users)
    tree = config_of(tmp_path, model).model_dump() | {"prompt": {"prefix": "", "item": "{title}", "suffix": ""}}
    config = Config.model_validate(tree)
    build_units(config)
    assert set(quarantined(config).values()) == {"empty prompt"}
    assert len(quarantined(config)) == 2


@needs_int8
def test_a_memory_in_int8_refuses_queries_in_float32(tmp_path: Path, model: str) -> None:
    users = random_users(4)
    dataset = write(tmp_path, users)
    plain = config_of(tmp_path, model, units=1)
    config = plain.model_copy(update={"model": plain.model.model_copy(update={"dtype": "int8"})})
    identity = identify_memory(config)
    build_units(config)
    expected, rows = expected_samples(users), rows_of(config)
    states = torch.tensor(np.stack([rows[sample]["state"] for sample in expected]), dtype=torch.float32)
    encoder = HistoryEncoder(config, dataset.items()["title"].to_pylist())
    queries = encoder.encode([row["item_indices"][:position] for row, position in expected.values()])
    assert relative_error(states, torch.from_numpy(queries.states_UD)) < 2e-3
    assert relative_error(states, torch.from_numpy(states_alone(config, list(expected.values())))) > 2e-3
    check_query(identity, identify_memory(config))
    with pytest.raises(InputError, match=r"another dtype \(int8, now float32\)"):
        check_query(identity, identify_memory(plain))


def test_states_that_overflow_are_quarantined(tmp_path: Path) -> None:
    users = random_users(2)
    write(tmp_path / "w", users)
    model = save_tiny(tmp_path / "model")
    config = config_of(tmp_path / "w", model)
    extractor = UnitExtractor(config, identify_memory(config))
    with torch.no_grad():
        extractor.encoder.backbone.model.norm.weight.mul_(1e6)
    (unit, *_) = plan_units(config, Dataset.open(Workspace.open(config.workspace)))
    record = extractor.build(unit)
    assert (record.rows, record.quarantined) == (0, len(users[0]["splits"]) - 1)
    assert set(quarantined(config).values()) == {"non-finite hidden state"}


def test_a_history_of_50_000_items_and_a_title_of_10_000_characters(tmp_path: Path) -> None:
    items = np.random.default_rng(0).integers(0, len(TITLES), 50_000).tolist()
    users = [user(0, items, [NONE, *[TRAIN] * 49_999])]
    write(tmp_path / "w", users)
    model = save_tiny(tmp_path / "model", num_hidden_layers=1)
    config = config_of(tmp_path / "w", model, sample_fraction=0.004)
    (record,) = build_units(config)
    rows = rows_of(config)
    assert record.rows == len(rows)
    assert 150 < len(rows) < 250
    expected = expected_samples(users)
    some = [sample for sample, row in rows.items() if TITLES[15] == TITLES[row["item_index"]]] + list(rows)[:20]
    alone = states_alone(config, [expected[sample] for sample in some])
    packed = np.stack([rows[sample]["state"] for sample in some]).astype(np.float32)
    assert relative_error(torch.from_numpy(packed), torch.from_numpy(alone)) < 2**-11


def test_a_committed_unit_is_left_unchanged(tmp_path: Path, model: str) -> None:
    write(tmp_path, random_users(3))
    config = config_of(tmp_path, model, units=2)
    first = build_units(config)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert build_units(config) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def test_units_are_ranges_of_users_and_their_names_depend_on_dataset_and_settings(tmp_path: Path, model: str) -> None:
    users = random_users(10)
    dataset = write(tmp_path, users)
    units = plan_units(config_of(tmp_path, model, units=4), dataset)
    assert [unit.start for unit in units] == [0, *(unit.stop for unit in units[:-1])]
    assert units[-1].stop == 10
    assert plan_units(config_of(tmp_path, model, units=4), dataset) == units
    assert len(plan_units(config_of(tmp_path, model), dataset)) == 10  # no more units than users
    others = [
        plan_units(config_of(tmp_path, model, units=5), dataset),
        plan_units(config_of(tmp_path, model, units=4, sample_fraction=0.5), dataset),
        plan_units(config_of(tmp_path, model, units=4), write(tmp_path / "other", users[1:])),
    ]
    assert not {unit.name for unit in units} & {unit.name for other in others for unit in other}


def test_the_batches_of_a_unit_have_a_bounded_size(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    users = random_users(6)
    write(tmp_path, users)
    config = config_of(tmp_path, model)
    extractor = UnitExtractor(config, identify_memory(config))
    monkeypatch.setattr("l2d_ray.stages.extraction.PADDED_TOKENS_PER_BATCH", 1_000)
    batches = list(extractor.batches(Unit("u", 0, 6)))
    assert len(batches) > 3
    assert sum(len(batch.prompts) for batch in batches) == len(expected_samples(users))
    for batch in batches:
        assert len(batch.prompts) * batch.longest < 1_000 + 30 * batch.longest  # a user adds up to 30 samples
        assert batch.longest == max((prompt.size for prompt in batch.prompts), default=0)


def test_the_identity_has_every_setting_that_decides_the_memory(tmp_path: Path, model: str) -> None:
    config = config_of(tmp_path, model, num_shards=3)
    identity = identify_memory(config)
    assert (identity.max_items, identity.stride, identity.num_shards) == (4, 3, 3)
    assert (identity.num_layers, identity.dimension, identity.dtype) == (2, 32, "float32")
    tree = config.model_dump()
    changes = {"history": {"max_items": 5, "stride": 3}, "prompt": {"suffix": "?"}, "memory": {"num_shards": 2}}
    for section, change in changes.items():
        other = identify_memory(Config.model_validate(tree | {section: change}))
        assert len(identity.differences(other)) == 1

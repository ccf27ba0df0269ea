import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.d3_files import PUBLISHED, publish
from support.small_workspace import environment_of_cluster

from l2d_ray.config import Config, DataConfig
from l2d_ray.data.dataset import Dataset
from l2d_ray.data.interactions import user_hashes
from l2d_ray.distributed.prepare import PrepareResult, prepare
from l2d_ray.errors import InputError
from l2d_ray.schema import Split
from l2d_ray.workspace import Workspace

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]
JOB = Path(__file__).parents[1] / "jobs" / "prepare_data.py"


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a log of 120 users and 40 items in three files; 4 items have no usable title and 2 are unknown."""
    folder = tmp_path_factory.mktemp("raw")
    random = np.random.default_rng(7)
    titles = {f"i{item}": f"Title {item}" for item in range(38)} | {"i0": "", "i1": "x", "i2": "w " * 30, "i3": None}
    pq.write_table(pa.table({"item_id": list(titles), "title": list(titles.values())}), folder / "items.parquet")
    (folder / "log").mkdir()
    for part in range(3):
        users, items = random.zipf(1.4, 700) % 120, random.zipf(1.3, 700) % 40
        log = {
            "user_id": [f"u{user}" for user in users],
            "item_id": [f"i{item}" for item in items],
            "timestamp": random.integers(0, 40, 700),
        }
        pq.write_table(pa.table(log), folder / "log" / f"{part}.parquet")
    return folder


def config_of(raw: Path, workspace: Path, **data: Any) -> Config:
    paths = {"interactions": str(raw / "log"), "items": str(raw / "items.parquet")}
    settings = {"source": "table", "min_interactions": 3, "num_blocks": 3} | paths | data
    return Config(workspace=str(workspace), data=DataConfig(**settings))


def users_of(workspace: Path) -> list[dict[str, Any]]:
    return [row for batch in Dataset.open(Workspace.open(str(workspace))).iter_users() for row in batch.to_pylist()]


def naive(raw: Path, k: int) -> tuple[dict[str, list[tuple[int, str]]], Counter[str]]:
    """Return the histories as (time, item), by user, and the dropped interactions, by the same rules on lists."""
    items = {row["item_id"]: row["title"] for row in pq.read_table(raw / "items.parquet").to_pylist()}
    log, dropped = [], Counter[str]()
    for path in sorted((raw / "log").iterdir()):
        for row in pq.read_table(path).to_pylist():
            title = items.get(row["item_id"], "unknown") or ""
            if row["item_id"] not in items:
                dropped["unknown_item"] += 1
            elif len(title) < 2 or len(title.split(" ")) > 20:
                dropped["no_title" if len(title) < 2 else "long_title"] += 1
            else:
                log.append((row["user_id"], row["item_id"], row["timestamp"]))
    before = len(log)
    while True:
        users, counts = Counter(user for user, _, _ in log), Counter(item for _, item, _ in log)
        kept = [row for row in log if users[row[0]] >= k and counts[row[1]] >= k]
        if len(kept) == len(log):
            break
        log = kept
    dropped["k_core"] = before - len(log)
    histories: dict[str, list[tuple[int, str]]] = {}
    for user, item, time in log:
        histories.setdefault(user, []).append((time, item))
    return {user: sorted(rows, key=lambda row: row[0]) for user, rows in histories.items()}, dropped


@pytest.fixture(scope="module")
def prepared(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PrepareResult, Path]:
    workspace = tmp_path_factory.mktemp("workspace")
    return prepare(config_of(raw, workspace)), workspace


def test_the_dataset_equals_a_naive_reference(raw: Path, prepared: tuple[PrepareResult, Path]) -> None:
    result, workspace = prepared
    expected, dropped = naive(raw, 3)
    items = Dataset.open(Workspace.open(str(workspace))).items()
    raw_items = pq.read_table(raw / "items.parquet").to_pylist()
    survivors = {item for rows in expected.values() for _, item in rows}
    assert items["item_id"].to_pylist() == [row["item_id"] for row in raw_items if row["item_id"] in survivors]
    assert items["item_index"].to_pylist() == list(range(len(survivors)))
    ids = items["item_id"].to_pylist()
    users = users_of(workspace)
    found = {
        row["user_id"]: list(zip(row["timestamps"], [ids[i] for i in row["item_indices"]], strict=True))
        for row in users
    }
    assert found == expected
    assert result.dropped == dropped
    assert (result.users, result.items) == (len(expected), len(survivors))
    assert result.interactions == sum(map(len, expected.values())) == 2_100 - dropped.total()
    assert result.samples == result.interactions - result.users == result.train + result.valid + result.test
    assert result.train == int(0.8 * result.samples)
    assert result.train + result.valid == int(0.9 * result.samples)
    hashes = [row["user_hash"] for row in users]
    assert hashes == sorted(hashes)
    assert hashes == user_hashes(pa.array([row["user_id"] for row in users])).tolist()


def test_the_time_split_equals_one_global_sort(prepared: tuple[PrepareResult, Path]) -> None:
    result, workspace = prepared
    samples = sorted(
        (time, row["user_hash"], position, split)
        for row in users_of(workspace)
        for position, (time, split) in enumerate(zip(row["timestamps"], row["splits"], strict=True))
        if split != Split.NONE
    )
    expected = [Split.TRAIN] * result.train + [Split.VALID] * result.valid + [Split.TEST] * result.test
    assert [split for _, _, _, split in samples] == expected


def test_the_result_does_not_depend_on_the_blocks(
    raw: Path, prepared: tuple[PrepareResult, Path], tmp_path: Path
) -> None:
    prepare(config_of(raw, tmp_path, num_blocks=7))
    one, other = (Dataset.open(Workspace.open(str(path))) for path in (prepared[1], tmp_path))
    assert len(one.parts) != len(other.parts)
    assert users_of(prepared[1]) == users_of(tmp_path)
    assert one.digest == other.digest
    # Parts in the order of their names hold the users in order.
    assert [part.path for part in other.parts] == sorted(part.path for part in other.parts)


def test_preparing_again_changes_no_byte(raw: Path, prepared: tuple[PrepareResult, Path]) -> None:
    result, workspace = prepared
    files = [path for path in workspace.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    again = prepare(config_of(raw, workspace))
    assert again.train == result.train
    assert before == {path: path.read_bytes() for path in workspace.rglob("*") if path.is_file()}


def test_a_user_is_told_if_most_interactions_are_dropped(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = prepare(config_of(raw, tmp_path, min_interactions=20))
    total = result.interactions + sum(result.dropped.values())
    line = f"the filters keep {result.interactions:,} of {total:,} interactions; dropped: "
    assert line in capsys.readouterr().err


def test_max_users_keeps_the_first_users(
    raw: Path, prepared: tuple[PrepareResult, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = prepare(config_of(raw, tmp_path, max_users=11, split="leave-one-out"))
    assert "the filters keep" not in capsys.readouterr().err
    first = users_of(prepared[1])[:11]
    assert [row["user_id"] for row in users_of(tmp_path)] == [row["user_id"] for row in first]
    assert result.dropped["max_users"] == prepared[0].interactions - result.interactions
    assert (result.valid, result.test) == (11, 11)
    assert {tuple(row["splits"][-2:]) for row in users_of(tmp_path)} == {(Split.VALID, Split.TEST)}
    used = {item for row in users_of(tmp_path) for item in row["item_indices"]}
    assert used == set(range(result.items))


def test_published_splits_are_kept(tmp_path: Path) -> None:
    raw = publish(tmp_path / "d3", PUBLISHED)
    result = prepare(raw.model_copy(update={"workspace": str(tmp_path / "workspace")}))
    assert (result.users, result.items, result.train, result.valid, result.test) == (3, 4, 3, 1, 2)
    assert result.dropped == {}
    splits = {row["user_id"]: row["splits"] for row in users_of(tmp_path / "workspace")}
    assert splits == {"u": [0, 1, 1, 2, 3], "v": [0, 0, 1], "w": [0, 3]}


def test_a_history_of_50_000_items_and_a_title_of_10_000_characters(tmp_path: Path) -> None:
    number = 50_000
    ids = [str(item) for item in range(number)]
    titles = ["字" * 10_000] + [f"Title {item}" for item in ids[1:]]
    pq.write_table(pa.table({"item_id": ids, "title": titles}), tmp_path / "items.parquet")
    (tmp_path / "log").mkdir()
    log = {"user_id": ["u"] * number, "item_id": ids, "timestamp": range(number)}
    pq.write_table(pa.table({name: list(column) for name, column in log.items()}), tmp_path / "log" / "0.parquet")
    result = prepare(config_of(tmp_path, tmp_path / "workspace", min_interactions=1))
    assert (result.users, result.interactions, result.test) == (1, number, 5_000)
    (user,) = users_of(tmp_path / "workspace")
    assert user["item_indices"] == list(range(number))


def test_an_empty_dataset_is_refused_with_the_reasons(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        prepare(config_of(raw, tmp_path, min_interactions=1_000))
    assert str(caught.value).startswith(f"data.interactions={str(raw / 'log')!r}: no interactions left after filtering")
    assert "k_core 1" in str(caught.value)
    assert str(caught.value).endswith(
        "; check data.items, lower data.min_interactions=1000 or widen data.since and data.until"
    )
    assert not (tmp_path / "dataset").exists()


def test_an_empty_folder_is_refused(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^data\.interactions='.*': no files there; give the folder of the files$"):
        prepare(config_of(raw, tmp_path, interactions=str(tmp_path)))


def test_malformed_input_is_one_line_and_status_2(raw: Path, tmp_path: Path) -> None:
    bad = tmp_path / "log.parquet"
    pq.write_table(pa.table({"user_id": ["u"], "item_id": ["i9"], "timestamp": [float("nan")]}), bad)
    overrides = [f"workspace={tmp_path}", "data.source=table", f"data.interactions={bad}"]
    done = run_job(*overrides, f"data.items={raw / 'items.parquet'}")
    assert done.stderr == (
        f"error: {bad}: row 1: timestamp=nan is not a whole number; give whole numbers, such as Unix seconds, or an"
        " Arrow timestamp column\n"
    )
    assert (done.returncode, done.stdout) == (2, "")


def test_the_last_line_of_the_job_is_its_result(
    raw: Path, tmp_path: Path, prepared: tuple[PrepareResult, Path]
) -> None:
    paths = [f"data.interactions={raw / 'log'}", f"data.items={raw / 'items.parquet'}"]
    done = run_job(f"workspace={tmp_path}", "data.source=table", "data.min_interactions=3", *paths)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    names = "users items interactions samples train valid test dropped items_left_out seconds dataset"
    assert list(result) == names.split()
    assert result["samples"] == prepared[0].samples
    assert result["dataset"] == str(tmp_path / "dataset")


def run_job(*overrides: str) -> subprocess.CompletedProcess[str]:
    job = [sys.executable, JOB, *overrides]
    return subprocess.run(job, env=environment_of_cluster(), capture_output=True, text=True, check=False)

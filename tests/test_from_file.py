"""Recommendations of another system: every form of the file, and everything that may be wrong with it."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv
from support.small_workspace import ITEM_COUNT, config_of, write_dataset

from l2d_ray.config import Config
from l2d_ray.core.metrics import NOT_RANKED
from l2d_ray.core.query import Query
from l2d_ray.core.samples import sample_ids
from l2d_ray.data.interactions import user_hashes
from l2d_ray.data.samples import choose_samples
from l2d_ray.errors import InputError
from l2d_ray.recommenders.from_file import FixedLists
from l2d_ray.recommenders.registry import find
from l2d_ray.schema import Split
from l2d_ray.stages.checks import evaluate as check
from l2d_ray.stages.evaluation import plan_evaluation
from l2d_ray.stages.evaluator import Evaluator

ITEMS = [f"i{n}" for n in range(9)]
WRITE: dict[str, Callable[[pa.Table, Path], Any]] = {".parquet": pq.write_table, ".csv": csv.write_csv}


def write(path: Path, **columns: list[Any]) -> str:
    WRITE[path.suffix](pa.table(columns), path)
    return str(path)


def lists(location: str, *samples: int | None, k: int = 5) -> list[tuple[list[int], list[float]]]:
    found = FixedLists.read(location, ITEMS).recommend([Query([0], k, sample_id=sample) for sample in samples])
    return [(one.items_I.tolist(), one.scores_I.tolist()) for one in found]


@pytest.mark.parametrize("suffix", WRITE)
@pytest.mark.parametrize(
    "numbers", [{"rank": [2, 1, 1]}, {"score": [-2, -1, -1.0]}, {"rank": [2, 1, 1], "score": [9, 1, 1]}]
)
def test_a_list_is_in_the_order_of_ranks_or_scores(tmp_path: Path, suffix: str, numbers: dict[str, Any]) -> None:
    location = write(tmp_path / f"x{suffix}", sample_id=[-5, -5, 7], item_id=["i3", "i8", "i1"], **numbers)
    assert lists(location, -5, 7) == [([8, 3], [-1, -2]), ([1], [-1])]
    assert lists(location, 6, 8, -9, None) == [([], [])] * 4


def test_of_equal_scores_the_smaller_item_index_is_first(tmp_path: Path) -> None:
    location = write(tmp_path / "x.csv", sample_id=[1, 1, 1], item_id=["i7", "i2", "i4"], score=[0.5, 0.5, 1])
    assert lists(location, 1, k=2) == [([4, 2], [1, 0.5])]


def test_a_sample_may_be_named_by_user_and_position(tmp_path: Path) -> None:
    location = write(tmp_path / "x.csv", user_id=["a", "b"], position=[4, 4], item_id=["i1", "i2"], rank=[1, 1])
    ids = sample_ids(user_hashes(pa.array(["a", "b"])), np.array([4, 4])).tolist()
    assert lists(location, *ids) == [([1], [-1]), ([2], [-1])]


def test_the_files_of_a_folder_are_one(tmp_path: Path) -> None:
    for part in (1, 2):
        write(tmp_path / f"part-{part}.parquet", sample_id=[1], item_id=[f"i{part}"], score=[float(part)])
    assert lists(str(tmp_path), 1) == [([2, 1], [2, 1])]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"item_id": ["i1"], "rank": [1]}, "no column 'sample_id' among 'item_id', 'rank'; write sample_id (or"),
        ({"user_id": ["a"], "item_id": ["i1"], "rank": [1]}, "no column 'position' among"),
        ({"sample_id": [1], "rank": [1]}, "no column 'item_id' among"),
        ({"sample_id": [1], "item_id": ["i1"]}, "no column 'rank' among"),
        ({"item_id": ["i1", "i99"], "rank": [1, 2]}, "row 2: item_id='i99' is not in the dataset's catalogue; remove"),
        ({"item_id": ["i1", ""], "rank": [1, 2]}, "row 2: item_id is empty; fill it in"),
        ({"item_id": ["i1", "i2"], "score": [1.0, float("nan")]}, "row 2: score=nan is no finite number; correct"),
        ({"item_id": ["i1", "i2"], "score": [1.0, float("inf")]}, "row 2: score=inf is no finite number; correct"),
        ({"item_id": ["i1", "i2"], "score": [1.0, None]}, "row 2: score=None is no finite number; correct"),
        ({"item_id": ["i1", "i2"], "rank": ["1", "first"]}, "row 2: rank='first' is no finite number; correct"),
        ({"sample_id": [1.5], "item_id": ["i1"], "rank": [1]}, "row 1: sample_id=1.5 is not a whole number"),
        ({"item_id": ["i1", "i2", "i1"], "rank": [1, 2, 3]}, "rows 1 and 3: item_id='i1' is in the list of a sample"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    rows = len(columns["item_id"]) if "item_id" in columns else 1
    samples = {} if message.startswith(("no column 'sample_id'", "no column 'position'")) else {"sample_id": [1] * rows}
    location = write(tmp_path / "x.parquet", **(samples | columns))
    with pytest.raises(InputError) as refused:
        lists(location)
    assert str(refused.value).startswith(f"{location}: {message}")


def test_a_missing_file_is_refused_with_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=rf"^evaluate\.recommenders='{tmp_path}/none\.csv': not found; give a file"):
        find("file:none.csv", Config(), "evaluate.recommenders")
    write(tmp_path / "there.csv", sample_id=[1], item_id=["i1"], rank=[1])
    assert find("file:there.csv", Config(), "evaluate.recommenders").options.location == f"{tmp_path}/there.csv"


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"^evaluate\.recommenders='file:/.*': the folder holds no file; give one with"
    ):
        lists(str(tmp_path))


def test_a_file_is_evaluated_like_any_other_recommender(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its targets are found at their places; a sample without a list counts as a miss, and one line says so."""
    samples = choose_samples(write_dataset(tmp_path, users=20), Split.TEST, 20)
    rows = [
        (sample.sample_id, f"i{item}", rank)
        for sample in samples[3:]
        for rank, item in enumerate([sample.target, *(n for n in range(ITEM_COUNT) if n != sample.target)])
    ]
    ids, items, ranks = map(list, zip(*rows, strict=True))
    location = write(tmp_path / "x.parquet", sample_id=ids, item_id=items, rank=ranks)
    plan = plan_evaluation(config_of(tmp_path, **{"evaluate.recommenders": f'["file:{location}"]'}))
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        f"{location}: no list for 3 of the 20 test samples; they count as misses"
    ]
    columns = {
        name: np.array([getattr(s, name) for s in samples])
        for name in ("sample_id", "user_hash", "target", "timestamp")
    }
    histories = np.empty(20, object)
    histories[:] = [sample.history for sample in samples]
    config = plan.config.replace({"recommend.exclude_seen": False})
    found = Evaluator(config, {"test": plan.recommenders}, {}).ranks(
        {"run": np.repeat("test", 20), "history": histories, **columns}
    )
    assert found["rank"].tolist() == [NOT_RANKED] * 3 + [0] * 17


def test_the_job_refuses_a_wrong_file_before_ray_starts(tmp_path: Path) -> None:
    write_dataset(tmp_path, users=3)
    location = write(tmp_path / "x.csv", sample_id=[1], item_id=["i99"], rank=[1])
    with pytest.raises(InputError, match=r"x\.csv: row 1: item_id='i99' is not in the dataset's catalogue"):
        check(config_of(tmp_path, **{"evaluate.recommenders": f'["file:{location}"]'}))

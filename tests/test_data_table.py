import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from support.raw_data import interactions_of, items_of

from l2d_ray.config import ColumnsConfig, Config, DataConfig
from l2d_ray.errors import InputError

NAMES = ColumnsConfig(user="who", item="what", timestamp="when", title="name")


def write_jsonl(rows: pa.Table, path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows.to_pylist()))


def write_tsv(rows: pa.Table, path: Path) -> None:
    pacsv.write_csv(rows, path, pacsv.WriteOptions(delimiter="\t"))


WRITERS: dict[str, Callable[[pa.Table, Path], Any]] = {
    ".parquet": pq.write_table,
    ".csv": pacsv.write_csv,
    ".tsv": write_tsv,
    ".jsonl": write_jsonl,
}


def config_of(interactions: Path, items: Path | None = None, columns: ColumnsConfig = NAMES) -> Config:
    paths = {"interactions": str(interactions), "items": str(items or interactions)}
    return Config(data=DataConfig(source="table", columns=columns, **paths))


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_tables(tmp_path: Path, suffix: str) -> None:
    log = pa.table({"x": [0.5, 1.5], "when": [30, 20], "what": ["10", "20"], "who": [1, 2]})
    items = pa.table({"what": ["10", "20"], "name": ["Amélie, 2001", 'A "quoted" title'], "price": [1.5, 2.0]})
    WRITERS[suffix](log, tmp_path / f"log{suffix}")
    WRITERS[suffix](items, tmp_path / f"items{suffix}")
    config = config_of(tmp_path / f"log{suffix}", tmp_path / f"items{suffix}")
    assert interactions_of(config).to_pylist() == [
        {"user_id": "1", "item_id": "10", "timestamp": 30, "row": 1},
        {"user_id": "2", "item_id": "20", "timestamp": 20, "row": 2},
    ]
    assert items_of(config).to_pylist() == [
        {"item_id": "10", "title": "Amélie, 2001"},
        {"item_id": "20", "title": 'A "quoted" title'},
    ]


def test_a_folder_is_all_its_files_in_order(tmp_path: Path) -> None:
    for name, user in (("b.parquet", "second"), ("a.csv", "first")):
        rows = pa.table({"who": [user], "what": ["1"], "when": [1]})
        WRITERS[Path(name).suffix](rows, tmp_path / name)
    assert interactions_of(config_of(tmp_path))["user_id"].to_pylist() == ["first", "second"]


def test_arrow_timestamps_stay_timestamps(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({"who": ["a"], "what": ["1"], "when": [datetime(2020, 1, 1)]}), path)
    assert interactions_of(config_of(path))["timestamp"].to_pylist() == [datetime(2020, 1, 1)]


def test_a_key_may_be_missing_in_any_json_object(tmp_path: Path) -> None:
    first, second = '{"what": "1"}\n', '{"what": "2", "name": "Two"}\n'
    for content in (first + second, second + first):
        (tmp_path / "items.jsonl").write_text(content)
        found = {row["item_id"]: row["title"] for row in items_of(config_of(tmp_path / "items.jsonl")).to_pylist()}
        assert found == {"1": "", "2": "Two"}


def test_rows_are_numbered_over_chunks(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    number = 250_000
    pq.write_table(pa.table({"who": ["a"] * number, "what": ["1"] * number, "when": list(range(number))}), path)
    assert interactions_of(config_of(path))["row"].to_pylist() == list(range(1, number + 1))


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_missing_column_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"log{suffix}"
    WRITERS[suffix](pa.table({"who": ["a"], "what": ["1"], "time": [1]}), path)
    with pytest.raises(InputError) as caught:
        interactions_of(config_of(path))
    assert str(caught.value) == (
        f"{path}: no column 'when' among 'who', 'what', 'time'; name the columns with"
        " data.columns.user, data.columns.item and data.columns.timestamp"
    )


@pytest.mark.parametrize(
    ("suffix", "problem"),
    [
        (".parquet", "row 2: when=nan is not a whole number"),
        (".csv", "row 2: when=nan is not a whole number"),
        (".jsonl", "row 2: when=nan is not a whole number"),
    ],
)
def test_a_time_that_is_nan_is_refused(tmp_path: Path, suffix: str, problem: str) -> None:
    path = tmp_path / f"log{suffix}"
    WRITERS[suffix](pa.table({"who": ["a", "b"], "what": ["1", "1"], "when": [1.0, float("nan")]}), path)
    with pytest.raises(InputError, match=rf"log{suffix}: {problem}; give whole numbers"):
        interactions_of(config_of(path))


@pytest.mark.parametrize(
    ("suffix", "problem"),
    [
        (".parquet", "row 2: when is null; fill it in or remove the row"),
        (".csv", "row 2: when='' is not a whole number"),
        (".jsonl", "row 2: when is null; fill it in or remove the row"),
    ],
)
def test_a_time_that_is_null_is_refused(tmp_path: Path, suffix: str, problem: str) -> None:
    path = tmp_path / f"log{suffix}"
    WRITERS[suffix](pa.table({"who": ["a", "b"], "what": ["1", "1"], "when": [1, None]}), path)
    with pytest.raises(InputError, match=rf"log{suffix}: {problem}"):
        interactions_of(config_of(path))


def test_text_times_are_refused_where_the_format_has_types(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({"who": ["a"], "what": ["1"], "when": ["1"]}), path)
    with pytest.raises(InputError, match=r"log\.parquet: row 1: when='1' is of type string; give whole numbers"):
        interactions_of(config_of(path))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("log.parquet", b"", "the file is empty; give the complete file"),
        ("log.parquet", b"PAR1 but not really", r"damaged Parquet file \(.*\); write it again"),
        ("log.csv", b"", "the file is empty; give the complete file"),
        ("log.jsonl", b"\n", "the file is empty; give the complete file"),
        ("log.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("log.jsonl", b'{"who": "\\ud83d", "what": "a", "when": 1}', r"row 1: who='\\ud83d' has half a character"),
        (
            "log.xlsx",
            b"x",
            r"unknown suffix '\.xlsx'; rename or convert the file to one of \.parquet, \.csv, \.tsv, \.jsonl, \.json",
        ),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: {problem}"):
        interactions_of(config_of(tmp_path / name))


def test_parquet_with_a_damaged_page_or_a_column_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    table = pa.table({"who": ["a"] * 50, "what": ["b"] * 50, "when": range(50)})
    pq.write_table(table, path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"log\.parquet: damaged Parquet file \(.*\); write it again"):
        interactions_of(config_of(path))
    pq.write_table(pa.Table.from_arrays([*table.columns, table["who"]], ["who", "what", "when", "who"]), path)
    with pytest.raises(InputError, match=r"log\.parquet: more than one column 'who' among .*; name the column"):
        interactions_of(config_of(path))


def test_parquet_without_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pq.write_table(pa.schema([("who", pa.string()), ("what", pa.string()), ("when", pa.int64())]).empty_table(), path)
    with pytest.raises(InputError, match=r"log\.parquet: no rows; give the complete file"):
        interactions_of(config_of(path))


def test_the_items_may_name_their_id_otherwise_than_the_interactions(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("uid,iid,ts\n1,10,30\n")
    (tmp_path / "items.csv").write_text("item_id,title\n10,Alien (1979)\n")
    names = ColumnsConfig(user="uid", item="iid", timestamp="ts", id_in_items="item_id")
    config = config_of(tmp_path / "log.csv", tmp_path / "items.csv", names)
    assert interactions_of(config)["item_id"].to_pylist() == ["10"]
    assert items_of(config).to_pylist() == [{"item_id": "10", "title": "Alien (1979)"}]
    wrong = config_of(tmp_path / "log.csv", tmp_path / "items.csv", ColumnsConfig(user="uid", item="iid"))
    with pytest.raises(InputError) as caught:
        items_of(wrong)
    assert str(caught.value) == (
        f"{tmp_path}/items.csv: no column 'iid' among 'item_id', 'title'; name the columns of the items with"
        " data.columns.id_in_items and data.columns.title"
    )

from datetime import date, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from l2d_ray.config import Config, DataConfig
from l2d_ray.data.catalogue import Rejection, read_catalogue
from l2d_ray.data.interactions import READ, in_period, read, take_tallies, user_hashes


def test_the_hash_of_a_user_id_is_fixed() -> None:
    assert user_hashes(pa.array(["u0", "196"])).tolist() == [3262765634605483607, 5490914285300799158]
    assert user_hashes(pa.array([], pa.string())).tolist() == []


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns", None])
def test_a_period_begins_at_midnight_and_ends_before_it(unit: str | None) -> None:
    times = [datetime(2019, 12, 31, 23, 59, 59), datetime(2020, 1, 1), datetime(2020, 1, 31, 23), datetime(2020, 2, 1)]
    column = pa.chunked_array([pa.array(times, pa.timestamp(unit or "s"))])
    column = column if unit else column.cast(pa.int64())
    assert in_period(column, date(2020, 1, 1), date(2020, 2, 1)).tolist() == [False, True, True, False]
    assert in_period(column, None, date(2020, 1, 1)).tolist() == [True, False, False, False]
    assert in_period(column, date(2020, 2, 1), None).tolist() == [False, False, False, True]
    assert in_period(column, None, None).all()


def test_dropped_interactions_are_counted_by_reason(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"item_id": ["a", "b", "c"], "title": ["Title", "", "x " * 30]}), tmp_path / "items.parquet"
    )
    log = pa.table({"user_id": list("uvwuvw"), "item_id": list("abcxxa"), "timestamp": [86400] * 5 + [5]})
    pq.write_table(log, tmp_path / "log.parquet")
    paths = {"interactions": str(tmp_path / "log.parquet"), "items": str(tmp_path / "items.parquet")}
    config = Config(data=DataConfig(source="table", since=date(1970, 1, 2), **paths))
    block = pa.concat_tables(list(read(paths["interactions"], 3, config, read_catalogue(config))))
    assert block.schema == READ
    usable, dropped = take_tallies(block)
    assert usable.drop_columns("user_hash").to_pylist() == [
        {"user_id": "u", "item": 0, "timestamp": 86400, "file": 3, "row": 1}
    ]
    assert usable["user_hash"].to_numpy() == user_hashes(usable["user_id"])
    assert dropped == {
        Rejection.UNKNOWN_ITEM: 2,
        Rejection.NO_TITLE: 1,
        Rejection.LONG_TITLE: 1,
        Rejection.OUTSIDE_PERIOD: 1,
    }


def test_interactions_later_than_a_moment_are_counted(tmp_path: Path) -> None:
    pq.write_table(pa.table({"item_id": ["a"], "title": ["Title"]}), tmp_path / "items.parquet")
    times = pa.array([datetime(2020, 1, 1), datetime(2020, 1, 2)], pa.timestamp("us"))
    pq.write_table(
        pa.table({"user_id": ["u", "u"], "item_id": ["a", "a"], "timestamp": times}), tmp_path / "log.parquet"
    )
    paths = {"interactions": str(tmp_path / "log.parquet"), "items": str(tmp_path / "items.parquet")}
    config = Config(data=DataConfig(source="table", **paths))
    latest = times.cast(pa.int64())[0].as_py()
    blocks = read(paths["interactions"], 0, config, read_catalogue(config), latest)
    usable, dropped = take_tallies(pa.concat_tables(list(blocks)))
    assert (usable["timestamp"].to_pylist(), dropped) == ([latest], {Rejection.FUTURE: 1})

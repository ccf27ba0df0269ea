from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from l2d_ray.config import Config, DataConfig
from l2d_ray.data.catalogue import Rejection, read_catalogue, title_verdicts
from l2d_ray.errors import InputError

NO, LONG = Rejection.NO_TITLE, Rejection.LONG_TITLE


def config_of(tmp_path: Path, ids: list[str], titles: list[str | None]) -> Config:
    path = tmp_path / "items.parquet"
    pq.write_table(pa.table({"item_id": ids, "title": titles}), path)
    return Config(data=DataConfig(source="table", interactions=str(path), items=str(path)))


@pytest.mark.parametrize(
    ("title", "verdict"),
    [
        ("", NO),
        ("Z", NO),
        ("   ", NO),
        ("IT", 0),
        (" ".join(["word"] * 20), 0),
        (" ".join(["word"] * 21), LONG),
        ("word " * 2_000, LONG),
        ("字" * 10_000, 0),
    ],
)
def test_a_title_needs_two_characters_and_at_most_20_words(title: str, verdict: int) -> None:
    assert title_verdicts(pa.array([title]), 20).tolist() == [verdict]


def test_a_title_of_10_000_characters_is_kept_whole(tmp_path: Path) -> None:
    catalogue = read_catalogue(config_of(tmp_path, ["a"], ["x" * 10_000]))
    assert catalogue.verdicts.tolist() == [0]
    assert catalogue.titles.to_pylist() == ["x" * 10_000]


def test_candidates_are_rows_of_the_items_file(tmp_path: Path) -> None:
    catalogue = read_catalogue(config_of(tmp_path, ["c", "a", "b"], ["Title", None, "Title"]))
    assert catalogue.find(pa.array(["a", "b", "x", "c"])).tolist() == [1, 2, -1, 0]
    assert catalogue.verdicts.tolist() == [0, NO, 0]


def test_repeated_ids_are_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, ["a", "b", "a", "b"], ["one", "two", "three", "four"])
    with pytest.raises(InputError) as caught:
        read_catalogue(config)
    assert str(caught.value) == (
        f"data.items={config.data.items!r}: item 'a' is in rows 1 and 3, and 2 ids are repeated; keep one row for each"
        " item"
    )

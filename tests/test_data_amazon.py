import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from support.raw_data import interactions_of, items_of

from l2d_ray.config import Config, DataConfig
from l2d_ray.errors import InputError

OLD = {"reviewerID": "A1", "asin": "B1", "overall": 5.0, "reviewText": "good", "unixReviewTime": 1400000000}
NEW = {"user_id": "A1", "asin": "B1-red", "parent_asin": "B1", "rating": 5.0, "timestamp": 1400000000123}


def config_of(tmp_path: Path, reviews: list[Any], metadata: str = "", suffix: str = "") -> Config:
    lines = "".join(json.dumps(review) + "\n" for review in reviews).encode()
    (tmp_path / f"reviews{suffix}").write_bytes(gzip.compress(lines) if suffix else lines)
    (tmp_path / "meta").write_text(metadata)
    paths = {"interactions": str(tmp_path / f"reviews{suffix}"), "items": str(tmp_path / "meta")}
    return Config(data=DataConfig(source="amazon", **paths))


@pytest.mark.parametrize("suffix", ["", ".json.gz"])
def test_reviews_of_2014_and_2018_are_in_seconds(tmp_path: Path, suffix: str) -> None:
    table = interactions_of(config_of(tmp_path, [OLD, OLD | {"asin": "B2"}], suffix=suffix))
    assert table.to_pylist() == [
        {"user_id": "A1", "item_id": "B1", "timestamp": 1400000000, "row": 1},
        {"user_id": "A1", "item_id": "B2", "timestamp": 1400000000, "row": 2},
    ]


def test_reviews_of_2023_have_the_parent_and_milliseconds(tmp_path: Path) -> None:
    table = interactions_of(config_of(tmp_path, [NEW]))
    assert table["timestamp"].type == pa.timestamp("ms")
    assert table.set_column(2, "timestamp", table["timestamp"].cast(pa.int64())).to_pylist() == [
        {"user_id": "A1", "item_id": "B1", "timestamp": 1400000000123, "row": 1}
    ]


def test_metadata_of_every_edition(tmp_path: Path) -> None:
    metadata = "\n".join(
        [
            "{'asin': 'B1', 'title': \"Women's shoe\", 'related': {'also_bought': ['B2']}}",
            '{"asin": "B2", "title": "A 2018 title"}',
            '{"parent_asin": "B3", "asin": "B3-red", "title": "A 2023 title"}',
            '{"asin": "B4"}',
            '{"asin": "B5", "title": null}',
        ]
    )
    items = items_of(config_of(tmp_path, [], metadata))
    assert items["item_id"].to_pylist() == ["B1", "B2", "B3", "B4", "B5"]
    assert items["title"].to_pylist() == ["Women's shoe", "A 2018 title", "A 2023 title", "", ""]


@pytest.mark.parametrize(
    ("raw", "title"),
    [
        ("Salt &amp; Pepper &quot;Set&quot;", 'Salt & Pepper "Set'),
        (' "Quoted" ', "Quoted"),
        ('<span id="x" class="a-size-base">', ""),
        ("Nice \ud83d cap", "Nice  cap"),
    ],
)
def test_titles_are_cleaned(tmp_path: Path, raw: str, title: str) -> None:
    config = config_of(tmp_path, [], json.dumps({"asin": "B1", "title": raw}))
    assert items_of(config)["title"].to_pylist() == [title]


@pytest.mark.parametrize("rows_at_a_time", [1, 2, 100])
def test_the_first_metadata_of_an_item_count(
    tmp_path: Path, rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("l2d_ray.data.amazon.CHUNK_ROWS", rows_at_a_time)
    records = [("B1", "first"), ("B1", "second"), ("B2", "other"), ("B1", "third")]
    metadata = "\n".join(json.dumps({"asin": asin, "title": title}) for asin, title in records)
    assert items_of(config_of(tmp_path, [], metadata)).to_pylist() == [
        {"item_id": "B1", "title": "first"},
        {"item_id": "B2", "title": "other"},
    ]


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ("{'asin': 'B1'}\nnonsense\n", "line 2: neither JSON nor a Python dict; give the metadata file"),
        ("['B1']\n", "line 1: neither JSON nor a Python dict; give the metadata file"),
        ('{"title": "x"}\n', "line 1: neither parent_asin nor asin; give the metadata file"),
        ("", "the file is empty; give the complete file"),
        ("[" * 100_000, "line 1: neither JSON nor a Python dict"),
        ('{"asin": "B\\ud83d"}\n', r"line 1: asin='B\\ud83d' is not printable; correct the line"),
    ],
)
def test_bad_metadata_are_refused(tmp_path: Path, metadata: str, problem: str) -> None:
    with pytest.raises(InputError, match=f"meta: {problem}"):
        items_of(config_of(tmp_path, [], metadata))


@pytest.mark.parametrize(
    ("reviews", "problem"),
    [
        (
            [{"user": 1}],
            "line 1: neither reviewerID, asin, unixReviewTime nor user_id, parent_asin, timestamp; give the reviews",
        ),
        ([OLD, {"reviewerID": "A1", "asin": "B1"}], "line 2: no key 'unixReviewTime'; complete the row or remove it"),
        ([OLD, OLD | {"unixReviewTime": None}], "row 2: unixReviewTime is null; fill it in or remove the row"),
        ([OLD, OLD | {"unixReviewTime": "yesterday"}], "row 2: unixReviewTime='yesterday': expected int or float"),
        ([OLD, OLD | {"asin": "B\ud83d"}], r"row 2: asin='B\\ud83d' has half a character; correct the row"),
        ([OLD, OLD | {"asin": ["B1"]}], r"row 2: asin=\['B1'\]: expected str or int"),
    ],
)
def test_bad_reviews_are_refused(tmp_path: Path, reviews: list[Any], problem: str) -> None:
    with pytest.raises(InputError, match=f"reviews: {problem}"):
        interactions_of(config_of(tmp_path, reviews))

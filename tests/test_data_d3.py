from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support.d3_files import PUBLISHED, publish, sample
from support.raw_data import items_of

from l2d_ray.config import Config
from l2d_ray.data import d3
from l2d_ray.data.catalogue import read_catalogue
from l2d_ray.data.interactions import read
from l2d_ray.errors import InputError
from l2d_ray.schema import Split


def group(config: Config) -> dict[str, dict[str, Any]]:
    catalogue = read_catalogue(config)
    files = d3.interaction_files(config)
    chunks = [c for number, path in enumerate(files) for c in read(path, number, config, catalogue)]
    samples = pa.concat_tables(chunks)
    block = d3.group(samples, catalogue.find, files)
    assert np.all(np.diff(block["user_hash"].to_numpy()) > 0)
    return {row.pop("user_id"): row for row in block.drop_columns("user_hash").to_pylist()}


@pytest.mark.parametrize("flat", [False, True])
def test_users_have_their_whole_history_and_the_published_splits(tmp_path: Path, flat: bool) -> None:
    users = group(publish(tmp_path, PUBLISHED, flat))
    none, train, valid, test = (int(split) for split in Split)
    assert users == {
        "u": {
            "item_indices": [1, 0, 3, 1, 3],
            "timestamps": [10, 20, 30, 40, 40],
            "splits": [none, train, train, valid, test],
        },
        "v": {"item_indices": [2, 0, 1], "timestamps": [12, 14, 25], "splits": [none, none, train]},
        "w": {"item_indices": [1, 1], "timestamps": [41, 50], "splits": [none, test]},
    }


def test_items_are_numbered_as_published_and_keep_their_titles(tmp_path: Path) -> None:
    items = items_of(publish(tmp_path, PUBLISHED))
    assert items["item_id"].to_pylist() == ["B2", "B1", "B3", "B4"]
    assert items["title"].to_pylist() == [f"Title, of {asin}'s" for asin in ("B2", "B1", "B3", "B4")]


def test_a_history_that_does_not_continue_the_user_is_refused(tmp_path: Path) -> None:
    broken = PUBLISHED | {"valid": [sample("u", [("B1", 20), ("B4", 30)], "B1", 40)]}
    with pytest.raises(InputError) as caught:
        group(publish(tmp_path, broken))
    assert str(caught.value) == (
        f"{tmp_path}/valid/CDs_2015.csv: row 1: item_asins=['B1', 'B4'] does not continue the earlier rows of user 'u';"
        " give the CSV files as D3 or BIGRec wrote them"
    )


def test_an_item_that_only_a_later_row_of_a_user_has_is_refused(tmp_path: Path) -> None:
    """Its number and title are read from first rows only, and it must not become another item."""
    broken = PUBLISHED | {"train": [sample("v", [("B2", 14)], "B1", 25), sample("v", [("B3", 12)], "B2", 14)]}
    with pytest.raises(InputError, match=r"row 2: item_asins=\['B3'\] has items that are neither a target nor in"):
        group(publish(tmp_path, broken))


def test_an_empty_history_is_refused(tmp_path: Path) -> None:
    broken = PUBLISHED | {"test": [sample("w", [], "B1", 50)]}
    with pytest.raises(InputError, match=r"test/CDs_2015\.csv: row 1: item_asins=\[\] does not continue the earlier"):
        group(publish(tmp_path, broken))


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("item_asins", "B1", "item_asins='B1' is not a list of str"),
        ("history_timestamp", "[1.5]", r"history_timestamp='\[1.5\]' is not a list of int"),
        ("timestamp", "soon", "timestamp='soon' is not a whole number"),
    ],
)
def test_cells_of_another_form_are_refused(tmp_path: Path, column: str, value: str, problem: str) -> None:
    broken = PUBLISHED | {"valid": [PUBLISHED["valid"][0] | {column: value}]}
    config = publish(tmp_path, broken)
    with pytest.raises(InputError, match=rf"valid/CDs_2015\.csv: row 1: {problem}; give"):
        list(d3.read_interactions(d3.interaction_files(config)[1], config))


def test_lists_of_different_lengths_are_refused(tmp_path: Path) -> None:
    broken = PUBLISHED | {"train": [PUBLISHED["train"][0] | {"history_item_title": []}]}
    with pytest.raises(InputError, match=r"row 1: item_asins, history_item_id and history_item_title differ in length"):
        items_of(publish(tmp_path, broken))


def test_a_missing_split_is_refused(tmp_path: Path) -> None:
    config = publish(tmp_path, {"train": PUBLISHED["train"]})
    with pytest.raises(InputError, match=r"data\.interactions='.*/valid': not found"):
        d3.interaction_files(config)


def test_two_files_for_a_split_are_refused(tmp_path: Path) -> None:
    config = publish(tmp_path, PUBLISHED)
    (tmp_path / "train" / "Games.csv").write_text("x")
    with pytest.raises(InputError, match=r"2 CSV files of train, not 1; give the CSV files as D3 or BIGRec wrote them"):
        d3.interaction_files(config)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    config = publish(tmp_path, PUBLISHED)
    (tmp_path / "train" / "CDs_2015.csv").write_text("user_id,item_asin\nu,B1\n")
    with pytest.raises(InputError, match=r"no column 'item_asins' among 'user_id', 'item_asin'; give the CSV files as"):
        items_of(config)

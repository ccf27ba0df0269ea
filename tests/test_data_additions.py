"""Items that are added without interactions: what enters, and what is refused."""

from pathlib import Path

import pyarrow as pa
import pytest
from support.growing import Log, append, prepare

from l2d_ray.config import Config, DataConfig
from l2d_ray.data.additions import MAX_CHARS, read_new_items
from l2d_ray.data.dataset import Dataset, write_version
from l2d_ray.errors import InputError
from l2d_ray.schema import ITEMS, Split
from l2d_ray.stages.settings import for_items

HELD = pa.table([[0, 1], ["a", "b"], ["Title a", "Title b"]], schema=ITEMS)


def read(folder: Path, *rows: str, held: pa.Table = HELD) -> pa.Table:
    path = folder / "new.csv"
    path.write_text("\n".join(["item_id,title", *rows]))
    return read_new_items(Config(data=DataConfig(items=str(path))), held)


def refusal(folder: Path, *rows: str) -> str:
    with pytest.raises(InputError) as caught:
        read(folder, *rows)
    return str(caught.value).replace(str(folder), "WS")


def test_new_items_have_the_indices_after_the_old_ones(tmp_path: Path) -> None:
    assert read(tmp_path, "d,Title d", "b,Title b", "c,Title c").to_pylist() == [
        {"item_index": 2, "item_id": "d", "title": "Title d"},
        {"item_index": 3, "item_id": "c", "title": "Title c"},
    ]
    assert len(read(tmp_path, "b,Title b")) == 0


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.items is missing; give the file of the items to add, with their ids"):
        read_new_items(Config(), HELD)
    assert refusal(tmp_path, "c,Title c", "b,Other") == (
        "data.items='WS/new.csv': item 'b' has the title 'Other', but 'Title b' in the dataset, with which memory"
        " rows were made; leave it out, or give it another id"
    )
    assert refusal(tmp_path, "c,Title c", "c,Title c").startswith(
        "data.items='WS/new.csv': item 'c' is in rows 1 and 2"
    )
    limits = f"give 2 to {MAX_CHARS}, of at most data.max_title_words=20 words"
    assert refusal(tmp_path, 'c,""') == f"data.items='WS/new.csv': item 'c': its title '' has 0 characters; {limits}"
    long = "x" * 10_000
    assert refusal(tmp_path, f"c,{long}") == (
        f"data.items='WS/new.csv': item 'c': its title '{long[:60]}…' has 10000 characters; {limits}"
    )
    assert refusal(tmp_path, "c," + "of " * 30).endswith(f"has 90 characters; {limits}")


def test_columns_are_those_of_the_dataset_unless_given(tmp_path: Path) -> None:
    log: Log = [("ann", "a", 1), ("ann", "b", 2)]
    dataset = prepare(tmp_path, log, {"a": "Title a", "b": "Title b"})
    dataset.manifest["data"]["columns"] |= {"id_in_items": "id", "title": "name"}
    dataset.manifest["data"]["max_title_words"] = 3
    data = for_items(Config(), dataset).data
    assert (data.columns.id_in_items, data.columns.title, data.max_title_words) == ("id", "name", 3)
    given = Config(data=DataConfig(columns={"title": "other"}))  # type: ignore[arg-type]
    assert for_items(given, dataset).data.columns.title == "other"


def test_a_dataset_with_added_items_goes_on_growing(tmp_path: Path) -> None:
    log: Log = [("ann", "a", 1), ("ann", "b", 2), ("ben", "b", 1), ("ben", "a", 5)]
    titles = {name: f"Title {name}" for name in "abcd"}
    first = prepare(tmp_path, log, titles)
    dataset = write_version(first, read(tmp_path, "c,Title c", held=first.items()), 0, [], {}, 0)
    assert dataset.version.lineage[0] == first.digest != dataset.digest
    assert dataset.items()["item_id"].to_pylist() == list("abc")
    assert (dataset.num_users, dataset.num_samples(Split.TRAIN)) == (2, 2)
    grown, _ = append(dataset, [("ann", "d", 7), ("ben", "c", 8)], titles)
    assert grown.items()["item_id"].to_pylist() == list("abcd")
    assert Dataset.open(grown.workspace, dataset.digest).items().equals(dataset.items())
    assert grown.num_samples(Split.TRAIN) == 4

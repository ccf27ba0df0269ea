"""The export: what the files hold is the dataset, and what comes back from them is evaluated on the same samples."""

import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.small_workspace import config_of, write_dataset

from l2d_ray.core.query import Query
from l2d_ray.core.samples import sample_ids
from l2d_ray.data.dataset import SAMPLE_SPLITS, Dataset, write_manifest, write_part
from l2d_ray.data.interactions import user_hashes
from l2d_ray.data.samples import iter_samples
from l2d_ray.errors import InputError
from l2d_ray.recommenders.from_file import FixedLists
from l2d_ray.schema import HISTORIES, ITEMS
from l2d_ray.stages.export import RECBOLE_ITEMS, ExportResult, export_samples
from l2d_ray.workspace import Workspace

USERS, LENGTH = 130, 60
ATOMIC = {"user_id:token": str, "item_id:token": str, "item_id_list:token_seq": str, "title:token_seq": str}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("workspace"), USERS, LENGTH)


@pytest.fixture(scope="module")
def result(dataset: Dataset) -> ExportResult:
    return export_samples(config_of(Path(dataset.workspace.uri)))


def recbole(result: ExportResult, name: str) -> pd.DataFrame:
    """Read an atomic file as RecBole does."""
    return pd.read_csv(f"{result.folder}/recbole/recbole{name}", sep="\t", dtype=ATOMIC)


def test_the_result_counts_what_is_there(dataset: Dataset, result: ExportResult) -> None:
    assert (result.users, result.items, result.interactions) == (USERS, 30, USERS * LENGTH)
    assert (result.train, result.valid, result.test) == (USERS * (LENGTH - 3), USERS, USERS)
    assert result.folder == dataset.workspace.path("export")


def test_samples_are_those_of_the_dataset(dataset: Dataset, result: ExportResult) -> None:
    rows = pq.read_table(f"{result.folder}/samples.parquet").to_pylist()
    found = {(row["split"], row["sample_id"]): row for row in rows}
    assert len(found) == len(rows) == USERS * (LENGTH - 1)
    for split in SAMPLE_SPLITS:
        for samples in iter_samples(dataset, split):
            for sample in samples.records():
                row = found.pop((split.name.lower(), sample.sample_id))
                assert row["history"] == [f"i{item}" for item in sample.history]
                assert (row["target"], row["timestamp"]) == (f"i{sample.target}", sample.timestamp)
                assert (row["position"], row["user_id"]) == (len(row["history"]), f"u{sample.user_hash // 1_000_003}")
    assert not found


def test_interactions_are_those_of_the_dataset(dataset: Dataset, result: ExportResult) -> None:
    table = pq.read_table(f"{result.folder}/interactions.parquet")
    users = pa.concat_tables(dataset.iter_users()).to_pylist()
    assert table["item_id"].to_pylist() == [f"i{item}" for user in users for item in user["item_indices"]]
    assert table["user_id"].to_pylist() == [user["user_id"] for user in users for _ in user["item_indices"]]
    assert table["split"].to_pylist()[:LENGTH] == ["none", *["train"] * (LENGTH - 3), "valid", "test"]
    assert set(table["weight"].to_pylist()) == {1.0}
    assert table["datetime"][2].as_py() == datetime.datetime(1970, 1, 1, 0, 0, 2)
    assert pq.read_table(f"{result.folder}/items.parquet").equals(dataset.items())


def test_recbole_reads_the_same_samples(result: ExportResult) -> None:
    whole = pd.read_parquet(f"{result.folder}/interactions.parquet")
    columns = {"user_id:token": "user_id", "item_id:token": "item_id", "timestamp:float": "timestamp"}
    pd.testing.assert_frame_equal(recbole(result, ".inter").rename(columns=columns), whole[list(columns.values())])
    samples = pd.read_parquet(f"{result.folder}/samples.parquet")
    for split in ("train", "valid", "test"):
        found, expected = recbole(result, f".{split}.inter"), samples[samples["split"] == split]
        assert found["item_id:token"].tolist() == expected["target"].tolist()
        lists = [" ".join(history[-RECBOLE_ITEMS:]) for history in expected["history"]]
        assert found["item_id_list:token_seq"].tolist() == lists
    assert recbole(result, ".item")["title:token_seq"][3] == "Title 3 of the year"


@pytest.mark.parametrize("names", [["sample_id"], ["user_id", "position"]])
def test_recommendations_for_exported_samples_come_back(tmp_path: Path, result: ExportResult, names: list[str]) -> None:
    samples = pd.read_parquet(f"{result.folder}/samples.parquet")
    lists = samples[names].assign(item_id=samples["target"], rank=1)
    lists.to_parquet(tmp_path / "lists.parquet")
    read = FixedLists.read(str(tmp_path / "lists.parquet"), [f"i{item}" for item in range(30)])
    ids = samples["sample_id"].to_numpy()
    if "user_id" in names:  # a dataset that a job prepared has these hashes
        ids = sample_ids(user_hashes(pa.array(samples["user_id"])), samples["position"].to_numpy())
    found = read.recommend([Query([0], sample_id=sample) for sample in ids.tolist()])
    assert [f"i{int(one.items_I[0])}" for one in found] == samples["target"].tolist()


def small(folder: Path, item: dict[str, Any], user: str = "u", time: int = 5) -> ExportResult:
    row = {"user_id": user, "user_hash": 1, "item_indices": [0, 0], "timestamps": [1, time], "splits": [0, 1]}
    workspace = Workspace.open(str(folder))
    parts = [write_part(workspace, 0, pa.Table.from_pylist([row], schema=HISTORIES))]
    write_manifest(workspace, pa.Table.from_pylist([{"item_index": 0} | item], schema=ITEMS), parts, {})
    return export_samples(config_of(folder, **{"export.folder": folder / "elsewhere"}))


def test_a_title_is_one_line_of_words(tmp_path: Path) -> None:
    result = small(tmp_path, {"item_id": "a", "title": ' "Ten\t"  days\n(1999) "'})
    assert recbole(result, ".item").to_numpy().tolist() == [["a", "Ten days (1999)"]]
    assert result.folder == str(tmp_path / "elsewhere")


@pytest.mark.parametrize("time", [893_286_638, 893_286_638_000, 893_286_638_000_000, 893_286_638_000_000_000])
def test_times_of_any_unit_become_dates(tmp_path: Path, time: int) -> None:
    result = small(tmp_path, {"item_id": "a", "title": "A"}, time=time)
    table = pq.read_table(f"{result.folder}/interactions.parquet")
    assert table["datetime"][1].as_py() == datetime.datetime(1998, 4, 22, 23, 10, 38)
    assert table["timestamp"][1].as_py() == time


@pytest.mark.parametrize(("item", "user", "named"), [("a b", "u", "item_id='a b'"), ("a", 'u"v', "user_id='u\"v'")])
def test_an_id_that_would_divide_a_line_is_refused(tmp_path: Path, item: str, user: str, named: str) -> None:
    with pytest.raises(InputError) as refused:
        small(tmp_path, {"item_id": item, "title": "A"}, user)
    assert str(refused.value).startswith(f"{named}: has white space or a quotation mark, which RecBole's files")
    assert not list(tmp_path.glob("elsewhere/recbole/*.inter"))

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from l2d_ray.data.dataset import MANIFEST, Dataset, content_sum, write_manifest, write_part
from l2d_ray.errors import InputError
from l2d_ray.schema import HISTORIES, ITEMS, Split
from l2d_ray.workspace import Workspace

ITEM_TABLE = pa.table([[0, 1, 2], ["a", "b", "c"], ["A", "B", "C"]], schema=ITEMS)


def histories(first: int, users: int, length: int = 4) -> pa.Table:
    rows = [
        {
            "user_id": f"u{user}",
            "user_hash": user,
            "item_indices": [(user + position) % 3 for position in range(length)],
            "timestamps": list(range(length)),
            "splits": [0, 1, 2, 3, *[3] * length][:length],
        }
        for user in range(first, first + users)
    ]
    return pa.Table.from_pylist(rows, schema=HISTORIES)


def write(workspace: Workspace, *tables: pa.Table, items: pa.Table = ITEM_TABLE) -> Dataset:
    parts = [write_part(workspace, number, table) for number, table in enumerate(tables)]
    write_manifest(workspace, items, parts, {"users": sum(len(table) for table in tables)})
    return Dataset.open(workspace)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(str(tmp_path / "work space"))


def test_a_written_dataset_is_read_again(workspace: Workspace) -> None:
    dataset = write(workspace, histories(0, 5), histories(5, 3))
    assert dataset.items().equals(ITEM_TABLE)
    assert dataset.num_users == 8
    assert [dataset.num_samples(split) for split in (Split.TRAIN, Split.VALID, Split.TEST)] == [8, 8, 8]
    assert pa.concat_tables(dataset.iter_users()).equals(histories(0, 8))


@pytest.mark.parametrize(("start", "stop"), [(0, 8), (0, 1), (2, 7), (5, 8), (4, 6), (3, 3), (6, 99)])
@pytest.mark.parametrize("batch_users", [1, 3, 100])
def test_any_range_of_users_is_read(workspace: Workspace, start: int, stop: int, batch_users: int) -> None:
    dataset = write(workspace, histories(0, 5), histories(5, 3))
    batches = list(dataset.iter_users(start, stop, batch_users))
    assert all(len(batch) <= batch_users and batch.schema == HISTORIES for batch in batches)
    users = [user for batch in batches for user in batch["user_hash"].to_pylist()]
    assert users == list(range(start, min(stop, 8)))


def test_only_the_row_groups_of_a_range_are_read(workspace: Workspace) -> None:
    dataset = write(workspace, histories(0, 25_000))
    path = workspace.path(dataset.parts[0].path)
    metadata = pq.ParquetFile(path).metadata
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [10_000, 10_000, 5_000]
    # A damaged first group does not matter to a range after it.
    chunk = metadata.row_group(0).column(0)
    content = bytearray(Path(path).read_bytes())
    content[4 : 4 + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    Path(path).write_bytes(content)
    assert sum(len(batch) for batch in dataset.iter_users(12_000, 25_000)) == 13_000
    with pytest.raises(OSError, match=r"\S"):
        list(dataset.iter_users(0, 1))


def test_long_histories_make_smaller_groups(workspace: Workspace) -> None:
    dataset = write(workspace, histories(0, 30, length=50_000))
    metadata = pq.ParquetFile(workspace.path(dataset.parts[0].path)).metadata
    assert metadata.row_group(0).num_rows == 20


def test_the_digest_depends_on_the_content_alone(workspace: Workspace) -> None:
    one = write(workspace, histories(0, 8)).digest
    assert write(workspace, histories(0, 3), histories(3, 5)).digest == one
    assert write(workspace, histories(0, 7)).digest != one
    other_title = ITEM_TABLE.set_column(2, "title", pa.array(["A", "B", "D"]))
    assert write(workspace, histories(0, 8), items=other_title).digest != one


@pytest.mark.parametrize("name", ["item_indices", "timestamps", "splits"])
def test_the_digest_depends_on_every_column(name: str) -> None:
    table = histories(0, 2)
    column = table.schema.get_field_index(name)
    lists = table[name].to_pylist()
    lists[1][3] = (lists[1][3] + 1) % 3
    changed = table.set_column(column, table.schema.field(name), pa.array(lists, table.schema.field(name).type))
    assert content_sum(changed) != content_sum(table)


def test_a_crash_before_the_manifest_leaves_the_old_dataset(workspace: Workspace) -> None:
    old = write(workspace, histories(0, 5), histories(5, 3))
    write_part(workspace, 0, histories(0, 4))
    write_part(workspace, 1, histories(4, 1))
    found = Dataset.open(workspace)
    assert found.manifest == old.manifest
    assert pa.concat_tables(found.iter_users()).equals(histories(0, 8))


def test_parts_that_the_manifest_does_not_list_are_removed(workspace: Workspace) -> None:
    write(workspace, histories(0, 5), histories(5, 3))
    Path(workspace.path("dataset/histories/part-00000-x.parquet.0123.tmp")).write_text("left by a crash")
    dataset = write(workspace, histories(0, 4))
    assert workspace.files("dataset/histories") == [part.path for part in dataset.parts]


def test_writing_the_same_again_changes_no_byte(workspace: Workspace) -> None:
    write(workspace, histories(0, 5))
    before = {path: Path(workspace.path(path)).read_bytes() for path in workspace.files("dataset")}
    write(workspace, histories(0, 5))
    assert before == {path: Path(workspace.path(path)).read_bytes() for path in workspace.files("dataset")}


def test_without_a_dataset_the_job_to_run_is_named(workspace: Workspace) -> None:
    with pytest.raises(InputError, match=r"dataset/dataset\.json: not found; run jobs/prepare_data\.py first$"):
        Dataset.open(workspace)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"format_version": 2}, r"format_version=2, not 1; run jobs/prepare_data\.py again"),
        ({"files": [{"path": "x"}]}, r"damaged \(.*\); run jobs/prepare_data\.py again"),
        ({"files": None}, r"damaged \(.*\); run jobs/prepare_data\.py again"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(workspace: Workspace, change: dict[str, Any], problem: str) -> None:
    manifest = write(workspace, histories(0, 5)).manifest
    Path(workspace.path(MANIFEST)).write_text(json.dumps(manifest | change))
    with pytest.raises(InputError, match=rf"dataset/dataset\.json: {problem}$"):
        Dataset.open(workspace)


def test_a_missing_part_is_named(workspace: Workspace) -> None:
    dataset = write(workspace, histories(0, 5))
    workspace.delete(dataset.parts[0].path)
    with pytest.raises(InputError, match=r"part-00000-.*\.parquet: not found, but the dataset lists it; run"):
        list(dataset.iter_users())


def test_the_entry_of_a_part_has_its_counts(workspace: Workspace) -> None:
    table = histories(0, 9)
    part, _ = write_part(workspace, 7, table)
    splits = np.concatenate(table["splits"].to_pylist())
    assert part.samples == {"train": (splits == 1).sum(), "valid": (splits == 2).sum(), "test": (splits == 3).sum()}
    assert (part.users, part.interactions) == (9, 36)
    assert part.path.startswith("dataset/histories/part-00007-")

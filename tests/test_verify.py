import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.small_memory import identity

from l2d_ray.core.samples import item_shards
from l2d_ray.memory.store import MemoryStore
from l2d_ray.schema import ITEMS, SAMPLES
from l2d_ray.workspace import Workspace

IDENTITY = identity(num_shards=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a workspace with a memory of two units of ten rows each."""
    store = MemoryStore(Workspace.open(str(tmp_path)))
    for number in range(2):
        items = np.arange(10, dtype=np.int32)
        ids = pa.array(range(10 * number, 10 * number + 10), pa.int64())
        samples = pa.table([ids, ids, pa.array(items), ids], schema=SAMPLES)
        with store.write_unit(f"u{number}", IDENTITY) as writer:
            writer.write(samples, np.ones((10, IDENTITY.dimension), np.float16))
    store.keep_items("digest", ITEMS.empty_table())
    store.take_snapshot(["u0", "u1"], "digest", 1.0)
    return tmp_path


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "l2d_ray.memory", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def data_files(folder: Path) -> list[Path]:
    return sorted((folder / "memory" / "data").rglob("*.parquet"))


def test_an_intact_memory_passes(folder: Path) -> None:
    process = run("verify", folder)
    assert (process.returncode, process.stderr) == (0, "")
    result = json.loads(process.stdout)
    assert (result["units"], result["rows"], result["snapshots"], result["problems"]) == (2, 20, 1, [])
    assert result["files"] == len(data_files(folder))


def test_a_changed_byte_is_found(folder: Path) -> None:
    victim = data_files(folder)[0]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    process = run("verify", folder)
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"error: {victim}: its checksum differs from the recorded one; delete the unit's record")


def test_missing_items_are_found(folder: Path) -> None:
    (items,) = (folder / "memory" / "items").iterdir()
    items.unlink()
    process = run("verify", folder)
    assert process.returncode == 1
    assert process.stderr == (
        f"error: snapshot 1: {items}: missing; run jobs/build_memory.py again with the dataset that the memory"
        " was made from\n"
    )


def test_a_missing_file_is_found(folder: Path) -> None:
    victim = data_files(folder)[0]
    victim.unlink()
    process = run("verify", folder)
    assert process.returncode == 1
    assert process.stderr.startswith(f"error: {victim}: missing, but unit u0 lists it")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("record", "changes", "message"),
    [
        ("units/u0", {"rows": 11}, "unit u0: its files hold 10 rows and 0 quarantined, but its record says 11"),
        ("units/u1", {"quarantined": 1}, "unit u1: its files hold 10 rows and 0 quarantined"),
        ("snapshots/1", {"rows": 7}, "snapshot 1: its units hold 20 rows and 0 quarantined, but its record says 7"),
        ("snapshots/1", {"units": ["u0", "u9"]}, "snapshot 1: its units u9 are not committed"),
        ("snapshots/1", {"units": ["u0", "u0"]}, "samples are repeated in shard"),
        (
            "snapshots/1",
            {"identity": IDENTITY.model_dump() | {"stride": 99}},
            "unit u0 has another stride (10, now 99)",
        ),
    ],
)
def test_a_wrong_count_is_found(folder: Path, record: str, changes: dict[str, object], message: str) -> None:
    edit(folder / "memory" / f"{record}.json", **changes)
    process = run("verify", folder)
    assert process.returncode == 1
    assert message in process.stderr


def test_a_row_in_the_wrong_shard_is_found(folder: Path) -> None:
    record = folder / "memory" / "units" / "u0.json"
    files = json.loads(record.read_text())["files"]
    path = folder / files[0]["path"]
    rows = pq.ParquetFile(path).read()
    others = [item for item in range(10) if item_shards(np.array([item]), IDENTITY.num_shards)[0] != files[0]["shard"]]
    moved = pa.array([others[0]] * len(rows), pa.int32())
    pq.write_table(rows.set_column(2, rows.schema.field(2), moved), path)
    files[0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    edit(record, files=files)
    process = run("verify", folder)
    assert process.returncode == 1
    assert "holds items of another shard" in process.stderr


def test_a_workspace_without_a_memory_is_refused_with_a_remedy(tmp_path: Path) -> None:
    process = run("verify", tmp_path)
    assert process.returncode == 2
    assert process.stderr.endswith("no snapshot; run jobs/build_memory.py first\n")


@pytest.mark.parametrize("arguments", [(), ("verify",), ("repair", "x"), ("verify", "a", "b")])
def test_a_wrong_command_line_prints_the_usage(arguments: tuple[str, ...]) -> None:
    process = run(*arguments)
    assert (process.returncode, process.stderr) == (2, "usage: python -m l2d_ray.memory verify WORKSPACE\n")

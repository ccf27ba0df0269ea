import gc
import hashlib
import resource
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from support.small_memory import identity

from l2d_ray.core.samples import item_shards
from l2d_ray.errors import InputError
from l2d_ray.memory.manifest import UnitRecord
from l2d_ray.memory.store import MemoryStore
from l2d_ray.records import MemoryIdentity
from l2d_ray.schema import QUARANTINE, SAMPLES, hidden_states, memory_schema
from l2d_ray.workspace import Workspace

IDENTITY = identity(num_shards=3)


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    return MemoryStore(Workspace.open(str(tmp_path)))


def samples(ids: range) -> pa.Table:
    """Make samples with these ids. Some share an item."""
    columns = [list(ids), [n // 5 for n in ids], [n % 20 for n in ids], [1000 + n for n in ids]]
    return pa.table([pa.array(c, t) for c, t in zip(columns, SAMPLES.types, strict=True)], schema=SAMPLES)


def states(ids: range) -> NDArray[np.float16]:
    """Make states [N, 8] that identify their sample."""
    return np.add.outer(np.array(ids), np.arange(8) / 8).astype(np.float16)


def commit(store: MemoryStore, unit: str, ids: range = range(30), identity: MemoryIdentity = IDENTITY) -> UnitRecord:
    with store.write_unit(unit, identity) as writer:
        writer.write(samples(ids), states(ids))
        writer.count_tokens(100, 400)
    record = store.committed(unit)
    assert record
    return record


def files(store: MemoryStore) -> list[str]:
    return store.workspace.files("memory")


def test_a_new_store_is_empty(store: MemoryStore) -> None:
    assert store.units() == {}
    assert store.committed("u") is None
    assert store.snapshots() == []
    store.accept(IDENTITY)
    store.remove_strays(["u"])
    assert files(store) == []


def test_the_record_of_a_unit_describes_its_files(store: MemoryStore, tmp_path: Path) -> None:
    record = commit(store, "u")
    assert store.units() == {"u": record}
    assert (record.rows, record.quarantined, record.tokens, record.tokens_one_by_one) == (30, 0, 100, 400)
    assert record.identity == IDENTITY
    assert sorted(file.path for file in record.files) == store.workspace.files("memory/data")
    for file in record.files:
        content = (tmp_path / file.path).read_bytes()
        assert (file.bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        assert file.path.startswith(f"memory/data/u/shard={file.shard}/")
        assert file.rows == pq.read_metadata(tmp_path / file.path).num_rows


def test_plain_pyarrow_reads_the_store(store: MemoryStore, tmp_path: Path) -> None:
    with store.write_unit("u", IDENTITY) as writer:
        writer.write(samples(range(20)), states(range(20)))
        writer.write(samples(range(20, 30)), states(range(20, 30)))
    table = pa.concat_tables(pq.read_table(path) for path in sorted(tmp_path.glob("memory/data/u/shard=*/*.parquet")))
    field = table.schema.field("hidden_state")
    assert field.metadata == {b"dtype": b"float16", b"dim": b"8"}
    found = np.frombuffer(b"".join(table["hidden_state"].to_pylist()), np.float16).reshape(-1, 8)
    order = np.argsort(table["sample_id"])
    assert (found[order] == states(range(30))).all()
    assert table.take(order).select(SAMPLES.names).to_pylist() == samples(range(30)).to_pylist()


def test_all_rows_of_an_item_are_in_its_shard(store: MemoryStore) -> None:
    commit(store, "u")
    snapshot = store.take_snapshot(["u"], "d", 1.0)
    total = 0
    for shard in range(IDENTITY.num_shards):
        for rows in store.read(snapshot, shard):
            assert set(item_shards(rows.column("item_index").to_numpy(), 3).tolist()) == {shard}
            total += rows.num_rows
    assert total == 30


@pytest.mark.filterwarnings("error")
def test_an_error_leaves_no_record_and_no_file(store: MemoryStore, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError, match="stop") as caught, store.write_unit("u", IDENTITY) as writer:  # noqa: PT012
        writer.write(samples(range(30)), states(range(30)))
        raise KeyError("stop")
    assert store.committed("u") is None
    assert files(store) == []
    del caught
    gc.collect()
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_leaves_no_record_and_no_file(store: MemoryStore) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match=r"memory/data/u/shard="):
            commit(store, "u", range(2_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert files(store) == []


def test_files_of_a_killed_attempt_are_removed(store: MemoryStore) -> None:
    commit(store, "v")
    for path in ("data/u/shard=0/dead.parquet", "data/u/shard=1/dead.parquet.1.tmp", "quarantine/u/dead.parquet"):
        store.workspace.write_json(f"memory/{path}", {})
    store.workspace.write_json("memory/data/v/shard=0/dead.parquet", {})
    assert store.committed("u") is None
    store.remove_strays(["u"])
    assert store.workspace.files("memory/data/u") == store.workspace.files("memory/quarantine/u") == []
    store.remove_strays(["v"])
    record = store.committed("v")
    assert record
    assert sorted(file.path for file in record.files) == store.workspace.files("memory/data")


def test_of_two_attempts_at_a_unit_the_first_to_commit_wins(store: MemoryStore) -> None:
    with store.write_unit("u", IDENTITY) as slow:
        slow.write(samples(range(30)), states(range(30)))
        slow.quarantine(samples(range(30, 33)), "why not")
        first = commit(store, "u")
    assert store.committed("u") == first
    assert files(store) == sorted([*(file.path for file in first.files), "memory/units/u.json"])


def test_a_unit_without_rows_is_committed_too(store: MemoryStore) -> None:
    with store.write_unit("u", IDENTITY):
        pass
    record = store.committed("u")
    assert record
    assert (record.rows, record.files) == (0, [])
    assert list(store.read(store.take_snapshot(["u"], "d", 1.0))) == []


def test_states_that_overflow_are_quarantined(store: MemoryStore, tmp_path: Path) -> None:
    wide = states(range(10)).astype(np.float32)
    wide[3, 2], wide[5, 0], wide[7] = 70_000, -70_000, np.nan
    with store.write_unit("u", IDENTITY) as writer, np.errstate(over="ignore"):
        writer.write(samples(range(10)), wide.astype(np.float16))
        writer.quarantine(samples(range(20, 22)), "why not")
        writer.quarantine(samples(range(0)), "nobody")
    record = store.committed("u")
    assert record
    assert (record.rows, record.quarantined) == (7, 5)
    snapshot = store.take_snapshot(["u"], "d", 1.0)
    assert (snapshot.rows, snapshot.quarantined) == (7, 5)
    ids = [sample for rows in store.read(snapshot) for sample in rows.column("sample_id").to_pylist()]
    assert sorted(ids) == [0, 1, 2, 4, 6, 8, 9]
    (file,) = tmp_path.glob("memory/quarantine/u/*.parquet")
    quarantined = pq.read_table(file)
    assert quarantined.schema.equals(QUARANTINE)
    reasons = dict(zip(quarantined["sample_id"].to_pylist(), quarantined["reason"].to_pylist(), strict=True))
    assert reasons == dict.fromkeys([3, 5, 7], "non-finite hidden state") | dict.fromkeys([20, 21], "why not")


def test_states_that_all_overflow_leave_no_data_file(store: MemoryStore) -> None:
    with store.write_unit("u", IDENTITY) as writer:
        writer.write(samples(range(4)), np.full((4, 8), np.inf, np.float16))
    record = store.committed("u")
    assert record
    assert (record.rows, record.quarantined) == (0, 4)
    assert store.workspace.files("memory/data") == []


def test_a_snapshot_lists_its_units_and_counts(store: MemoryStore) -> None:
    commit(store, "b", range(30))
    commit(store, "a", range(30, 50))
    snapshot = store.take_snapshot(["b", "a"], "digest", 0.5)
    assert (snapshot.number, snapshot.units, snapshot.rows) == (1, ["a", "b"], 50)
    assert (snapshot.dataset, snapshot.sample_fraction, snapshot.identity) == ("digest", 0.5, IDENTITY)
    ids = [sample for rows in store.read(snapshot, columns=["sample_id"]) for sample in rows["sample_id"].to_pylist()]
    assert sorted(ids) == list(range(50))


def test_a_snapshot_is_the_newest_and_is_not_repeated(store: MemoryStore) -> None:
    """Later stages read the newest snapshot, so one of fewer units must not hide a later one of all units."""
    for unit in "ab":
        commit(store, unit)
    first = store.take_snapshot(["a"], "d", 1.0)
    second = store.take_snapshot(["a", "b"], "d", 1.0)
    before = files(store)
    assert store.take_snapshot(["b", "a"], "d", 1.0) == second
    assert (first.number, second.number) == (1, 2)
    assert files(store) == before
    again = store.take_snapshot(["a"], "d", 1.0)
    assert (again.number, again.units) == (3, first.units)
    assert store.snapshots() == [first, second, again]
    assert store.snapshot() == again
    assert store.snapshot(1) == first


def test_the_tenth_snapshot_comes_after_the_ninth(store: MemoryStore) -> None:
    for number in range(11):
        commit(store, f"u{number}", range(1))
        store.take_snapshot([f"u{number}"], "d", 1.0)
    assert [snapshot.number for snapshot in store.snapshots()] == list(range(1, 12))
    assert store.snapshot().number == 11


def test_a_missing_snapshot_is_refused_with_a_remedy(store: MemoryStore) -> None:
    with pytest.raises(InputError, match=r"/memory/snapshots: no snapshot; run jobs/build_memory\.py first$"):
        store.snapshot()
    with pytest.raises(InputError, match=r"/memory/snapshots/7\.json: not found"):
        store.snapshot(7)


def test_a_snapshot_of_units_that_are_not_committed_is_refused_by_name(store: MemoryStore) -> None:
    commit(store, "a")
    with pytest.raises(InputError, match=r"/memory/units: a snapshot needs committed units; not committed: b, c; run"):
        store.take_snapshot(["c", "a", "b"], "d", 1.0)
    with pytest.raises(InputError, match=r"/memory/units: a snapshot needs committed units; not committed: any; run"):
        store.take_snapshot([], "d", 1.0)
    assert store.snapshots() == []


def test_a_snapshot_of_units_that_disagree_is_refused_by_name(store: MemoryStore) -> None:
    commit(store, "a")
    commit(store, "b", identity=IDENTITY.model_copy(update={"adapter": "a" * 64}))
    with pytest.raises(InputError) as caught:
        store.take_snapshot(["a", "b"], "d", 1.0)
    where = store.workspace.path("memory/units")
    difference = f"adapter ({'a' * 12}, now None)"
    assert str(caught.value) == f"{where}: units b and a differ in {difference}; use another workspace"
    assert store.snapshots() == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"base_model": "c" * 64}, f"base_model ({'b' * 12}, now {'c' * 12})"),
        ({"adapter": "c" * 64}, f"adapter (None, now {'c' * 12})"),
        ({"template": "c" * 64}, f"template ({'p' * 12}, now {'c' * 12})"),
        ({"tokenizer": "c" * 64}, f"tokenizer ({'t' * 12}, now {'c' * 12})"),
        ({"max_items": 20, "stride": 1}, "max_items (10, now 20), stride (10, now 1)"),
        ({"dtype": "bfloat16", "num_layers": 1}, "num_layers (2, now 1), dtype (float32, now bfloat16)"),
        ({"dimension": 16, "num_shards": 4}, "dimension (8, now 16), num_shards (3, now 4)"),
    ],
)
def test_a_memory_of_another_identity_is_not_extended(store: MemoryStore, change: dict[str, int], named: str) -> None:
    commit(store, "u")
    store.accept(IDENTITY)
    with pytest.raises(InputError) as caught:
        store.accept(IDENTITY.model_copy(update=change))
    where = store.workspace.path("memory")
    remedy = "use another workspace, or delete this folder"
    assert str(caught.value) == f"{where}: was made with another {named}; {remedy}"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('"rows": 30', '"rows": "many"', "rows: Input should be a valid integer"),
        ('"tokens": 100', '"jokes": 100', "tokens: Field required"),
    ],
)
def test_a_damaged_record_is_refused(store: MemoryStore, tmp_path: Path, old: str, new: str, problem: str) -> None:
    commit(store, "u")
    file = tmp_path / "memory" / "units" / "u.json"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(InputError, match=rf"units/u\.json: {problem}.*; the file is damaged or of another version"):
        store.units()


def test_slices_hold_the_states_of_their_rows() -> None:
    column = pa.array([row.tobytes() for row in states(range(10))], pa.binary(16))
    batch = samples(range(10)).append_column(memory_schema(8).field("hidden_state"), column).to_batches()[0]
    assert (hidden_states(batch) == states(range(10))).all()
    assert (hidden_states(batch.slice(3, 4)) == states(range(3, 7))).all()
    table = pa.Table.from_batches([batch.slice(8), batch.slice(2, 3).slice(1)])
    assert (hidden_states(table) == states(range(10))[[8, 9, 3, 4]]).all()
    assert hidden_states(batch.slice(0, 0)).shape == (0, 8)

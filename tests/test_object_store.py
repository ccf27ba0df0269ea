"""A workspace on a real S3 server: whole objects, exclusive records, faults, and errors a user can reach."""

import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support.growing import append, build_without_model, histories_of, prepare
from support.keeping import run_here
from support.s3_server import Faults, S3Server, faulty_proxy, free_port
from support.small_memory import identity, rows

from l2d_ray.command_line import load_config
from l2d_ray.data.dataset import Dataset
from l2d_ray.errors import InputError
from l2d_ray.memory.store import MemoryStore
from l2d_ray.memory.verify import verify
from l2d_ray.memory.writer import UnitWriter
from l2d_ray.stages.compaction import compact
from l2d_ray.stages.erasure import erase
from l2d_ray.workspace import Workspace

PART = 10 << 20
"""Bytes from which obstore uploads an object in parts."""


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def workspace(s3: S3Server, faults: Faults, request: pytest.FixtureRequest) -> Iterator[Workspace]:
    """Open a workspace of this test, through a proxy that has no faults yet."""
    with faulty_proxy(s3, faults) as port:
        yield Workspace.open(s3.uri(request.node.name.replace("[", "-").rstrip("]"), port))


@pytest.mark.parametrize("size", [0, 1_000, 12_000_000])
def test_a_stream_that_raises_leaves_nothing(workspace: Workspace, size: int) -> None:
    def write() -> None:
        with workspace.create("a/file") as stream:
            stream.write(b"x" * size)
            raise KeyError

    with pytest.raises(KeyError):
        write()
    assert workspace.files("") == []


@pytest.mark.parametrize("size", [0, 1_000, 12_000_000])
def test_a_stream_leaves_its_content(workspace: Workspace, size: int) -> None:
    content = np.random.default_rng(0).bytes(size)
    with workspace.create("a/file") as stream:
        for start in range(0, size, 1 << 20):
            stream.write(content[start : start + (1 << 20)])
    with workspace.filesystem.open_input_stream(workspace.path("a/file")) as stream:
        assert stream.read() == content


@pytest.mark.slow
def test_of_several_writers_of_a_record_one_wins(workspace: Workspace) -> None:
    def write(record: int, writer: int) -> int | None:
        try:
            workspace.write_json(f"records/{record}.json", {"writer": writer}, exclusive=True)
        except FileExistsError:
            return None
        return writer

    with ThreadPoolExecutor(8) as pool:
        for record in range(4):
            winners = [
                won for won in pool.map(lambda writer, at=record: write(at, writer), range(8)) if won is not None
            ]
            assert winners == [workspace.read_json(f"records/{record}.json")["writer"]]


def test_of_two_runs_that_append_to_a_dataset_one_wins(workspace: Workspace) -> None:
    titles = {"a": "Title a", "b": "Title b"}
    old = prepare(workspace.uri, [("ann", "a", 1)], titles)
    grown, _ = append(old, [("ann", "b", 2)], titles)
    with pytest.raises(FileExistsError):
        append(old, [("ben", "b", 2)], titles)
    found = Dataset.open(workspace)
    assert found.version == grown.version
    assert histories_of(found) == {"ann": [("a", 1), ("b", 2)]}
    assert histories_of(Dataset.open(workspace, old.digest)) == {"ann": [("a", 1)]}


def test_a_record_takes_one_request(workspace: Workspace, faults: Faults) -> None:
    workspace.write_json("a/b/c.json", {"x": 1}, exclusive=True)
    workspace.write_json("a/b/c.json", {"x": 2})
    assert workspace.read_json("a/b/c.json") == {"x": 2}
    assert [request.method for request in faults.requests] == ["PUT", "PUT", "GET"]


@pytest.mark.slow
@pytest.mark.parametrize(("refused", "lost"), [(0.2, 0.0), (0.0, 0.2), (0.2, 0.2)])
def test_requests_that_fail_lose_and_double_nothing(
    workspace: Workspace, faults: Faults, refused: float, lost: float
) -> None:
    faults.refused, faults.lost = refused, lost
    for number in range(20):
        workspace.write_json(f"new/{number}.json", {"number": number}, exclusive=True)
        workspace.write_json("same.json", {"number": number})
    for number in (1, 2):
        with workspace.create(f"large/{number}") as stream:
            stream.write(bytes([number]) * (PART + 1))
    assert len(workspace.files("new")) == 20
    assert workspace.read_json("same.json") == {"number": 19}
    with pytest.raises(FileExistsError):
        workspace.write_json("new/3.json", {"number": 4}, exclusive=True)
    for number in (1, 2):
        with workspace.filesystem.open_input_stream(workspace.path(f"large/{number}")) as stream:
            assert stream.read() == bytes([number]) * (PART + 1)
    workspace.delete("new")
    assert workspace.files("new") == []


def _write(writer: UnitWriter) -> None:
    states, samples = rows(count=20, items=5)
    writer.write(samples, states)


def test_a_unit_takes_few_requests_besides_its_data(workspace: Workspace, faults: Faults) -> None:
    store = MemoryStore(workspace)
    assert store.committed("one") is None
    with store.write_unit("one", identity(2)) as writer:
        _write(writer)
    record = store.committed("one")
    assert record is not None
    files = [request for request in faults.requests if any(file.path in request.path for file in record.files)]
    assert len(files) == len(record.files)
    assert len(faults.requests) - len(files) <= 12


def test_an_attempt_that_commits_second_removes_its_files(workspace: Workspace) -> None:
    store = MemoryStore(workspace)
    with store.write_unit("one", identity(2)) as late:
        _write(late)
        with store.write_unit("one", identity(2)) as early:
            _write(early)
    record = store.committed("one")
    assert record is not None
    assert sorted(workspace.files("memory/data")) == sorted(file.path for file in record.files)
    assert {file.path for file in record.files} == {file.path for file in early.files}


def test_a_workspace_is_the_same_in_another_process(workspace: Workspace) -> None:
    workspace.write_json("a.json", {"x": 1})
    assert pickle.loads(pickle.dumps(workspace)).read_json("a.json") == {"x": 1}


def test_files_and_folders_are_listed_copied_and_deleted(workspace: Workspace, tmp_path: Path) -> None:
    for name in ("a/1.json", "a/b/2.json", "c/3.txt"):
        workspace.write_json(name, {})
    assert workspace.files("a", ".json") == ["a/1.json", "a/b/2.json"]
    assert workspace.folders() == ["a", "c"]
    assert [workspace.exists(name) for name in ("a", "a/1.json", "d")] == [True, True, False]
    local = Workspace.open(str(tmp_path))
    workspace.copy("a", local, "copy")
    assert local.files("copy") == ["copy/1.json", "copy/b/2.json"]
    for name in ("a/1.json", "a", "not there"):
        workspace.delete(name)
    assert workspace.files("") == ["c/3.txt"]


@pytest.mark.slow
def test_a_user_is_erased_and_the_files_are_compacted(workspace: Workspace, tmp_path: Path) -> None:
    log = [(f"u{number % 5}", f"i{number % 7}", number) for number in range(60)]
    titles = {f"i{number}": f"Title {number}" for number in range(7)}
    dataset = prepare(workspace.uri, log[:40], titles)
    build_without_model(workspace.uri)
    append(dataset, log[40:], titles)
    build_without_model(workspace.uri)
    (tmp_path / "users.txt").write_text("u3")
    keep = ["compact.keep_snapshots=1", "compact.keep_days=0", "compact.grace_hours=0"]
    config = load_config([f"workspace={workspace.uri}", f"erase.users={tmp_path / 'users.txt'}", *keep])
    assert (erase(config, run_here).users, compact(config, run_here).units) == (1, 1)
    written = workspace.times("")
    assert all(abs(at - time.time()) < 600 for at in written.values())
    folders = Counter("/".join(path.split("/")[:2]) for path in written)
    assert folders["dataset/histories"] == folders["memory/snapshots"] == folders["memory/units"] == 1
    assert histories_of(Dataset.open(workspace)).keys() == {"u0", "u1", "u2", "u4"}
    assert verify(workspace).problems == []


def test_a_store_that_ignores_conditions_is_refused(workspace: Workspace, faults: Faults) -> None:
    workspace.check()
    workspace.check()
    assert len(faults.requests) == 3
    faults.unconditional = True
    with pytest.raises(InputError, match=r"ignores If-None-Match, so two workers could overwrite each other's records"):
        workspace.check()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s4://bucket/x", "s4:// is not known; give a folder, s3://bucket/… or gs://bucket/…"),
        ("s3:///x", "no bucket; give s3://bucket/folder or gs://bucket/folder"),
        ("s3://key:secret@bucket/x", "a URI must not hold credentials; give them by the environment or a profile"),
        ("s3://bucket/x?regoin=eu", "regoin= is not known; use anonymous, connect_timeout, endpoint_override, region"),
        ("s3://bucket/x?retries=often", "retries=often is not a positive number"),
        ("gs://bucket/x?region=eu", "region= is not known; use anonymous, connect_timeout, endpoint_override"),
    ],
)
def test_a_uri_that_cannot_be_used_is_refused(uri: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        Workspace.open(uri)
    assert str(refused.value).startswith(f"{uri!r}: {message}")


@pytest.mark.slow
def test_a_server_that_is_down_is_reported_within_a_minute(s3: S3Server) -> None:
    started = time.monotonic()
    workspace = Workspace.open(s3.uri("x", free_port()))
    with pytest.raises(OSError, match=r"bucket/x/conditional-put: .*error sending request"):
        workspace.check()
    assert time.monotonic() - started < 60


def _another_bucket(uri: str, environment: Callable[[str, str], None]) -> str:
    return uri.replace("s3://bucket", "s3://no-such-bucket")


def _a_wrong_secret(uri: str, environment: Callable[[str, str], None]) -> str:
    environment("AWS_SECRET_ACCESS_KEY", "wrong")
    return uri


def _an_unknown_key(uri: str, environment: Callable[[str, str], None]) -> str:
    environment("AWS_ACCESS_KEY_ID", "nobody")
    return uri


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_another_bucket, "NoSuchBucket"),
        (_a_wrong_secret, "SignatureDoesNotMatch"),
        (_an_unknown_key, "InvalidAccessKeyId"),
    ],
)
def test_what_the_server_refuses_is_one_line(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, change: Callable[..., str], message: str
) -> None:
    workspace = Workspace.open(change(s3.uri("x"), monkeypatch.setenv))
    with pytest.raises(OSError, match=message) as refused:
        workspace.check()
    assert "\n" not in str(refused.value)
    assert "conditional-put" in str(refused.value)


def test_without_credentials_the_remedy_is_named(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    workspace = Workspace.open(s3.uri("x"))
    with pytest.raises(InputError, match="no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        workspace.check()


def test_credentials_come_from_a_profile_too(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from support.s3_server import KEY, SECRET

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text(f"[work]\naws_access_key_id={KEY}\naws_secret_access_key={SECRET}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "work")
    workspace = Workspace.open(s3.uri("profile"))
    workspace.write_json("a.json", {"x": 1})
    assert workspace.files("") == ["a.json"]

"""Erasing and compacting that fail at any write or are killed, and several jobs at the same time."""

import itertools
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from support.growing import Log, append, build_without_model, histories_of, prepare, random_log, titles_of
from support.keeping import AT_ONCE, compacted, erased, ids_of, opened, shape, traces
from support.small_workspace import environment_of_scripts, expected_ids, states_of

from l2d_ray.errors import InputError
from l2d_ray.memory.verify import verify
from l2d_ray.storage import local
from l2d_ray.storage.local import LocalStorage
from l2d_ray.workspace import Workspace

LOG: Log = list(dict.fromkeys(random_log(120, 12, 8)))
TITLES = titles_of(LOG)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace whose dataset and memory grew once."""
    folder = tmp_path_factory.mktemp("built")
    dataset = prepare(folder, LOG[:80], TITLES)
    build_without_model(folder, units=2)
    append(dataset, LOG[80:], TITLES)
    build_without_model(folder)
    return folder


def work(folder: Path) -> None:
    erased(folder, users=["u3"], items=["i2"])
    compacted(folder, **AT_ONCE)


def check(folder: Path, built: Path) -> None:
    """Assert that the work is done, and nothing more."""
    ids = ids_of("u3", len(histories_of(opened(built))["u3"]))
    assert traces(folder, "u3", ids) == set()
    assert sorted(states_of(folder)) == expected_ids(folder)
    assert states_of(folder).keys() < states_of(built).keys()
    assert verify(Workspace.open(str(folder))).problems == []


class Fault:
    """A disk on which one operation fails, before it has an effect or with a part of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, late: bool) -> None:
        self.left, self.late = number, late
        publish, remove = local._publish, LocalStorage.remove
        monkeypatch.setattr(local, "_publish", lambda *given: self.fail(lambda: publish(*given)))
        monkeypatch.setattr(LocalStorage, "remove", lambda storage, paths: self._remove(remove, storage, paths))

    def fail(self, operation: Callable[[], None]) -> None:
        self.left -= 1
        if self.left == -1 and not self.late:
            raise OSError("a fault of the test")
        operation()
        if self.left == -1:
            raise OSError("a fault of the test")

    def _remove(self, remove: Callable[..., None], storage: LocalStorage, paths: list[str]) -> None:
        for path in paths:
            self.fail(lambda path=path: remove(storage, [path]))  # type: ignore[misc]


@pytest.mark.slow
def test_a_fault_at_any_write_leaves_what_the_same_command_completes(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(built, tmp_path / "once")
    work(tmp_path / "once")
    expected = shape(tmp_path / "once")
    for number in itertools.count():
        for late in (False, True):
            folder = tmp_path / "ws"
            shutil.copytree(built, folder)
            with monkeypatch.context() as patched:
                fault = Fault(patched, number, late)
                with suppress(OSError):
                    work(folder)
            assert verify(Workspace.open(str(folder))).problems == []
            work(folder)
            check(folder, built)
            assert shape(folder) == expected
            shutil.rmtree(folder)
        if fault.left >= 0:
            break
    assert number > 30


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rounds", "kills"), [(4, 10), pytest.param(18, 50, marks=pytest.mark.long)], ids=["some kills", "many kills"]
)
def test_killed_steps_leave_what_the_same_steps_complete(rounds: int, kills: int, tmp_path: Path) -> None:
    """Appending, extracting, indexing, erasing and compacting; a round has five kills, some of which come too late."""
    script = [sys.executable, str(Path(__file__).parent / "support/killed_steps.py"), str(tmp_path), str(rounds)]
    run = subprocess.run(script, env=environment_of_scripts(), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.splitlines()[-1]) >= kills


def test_jobs_at_the_same_time_come_in_some_order_or_are_refused(built: Path, tmp_path: Path) -> None:
    folder, refused = tmp_path / "ws", list[Exception]()
    shutil.copytree(built, folder)

    def grow(item: str) -> None:
        with suppress(FileExistsError):  # jobs/prepare_data.py starts again then
            append(opened(folder), [("u1", item, 10**6)], TITLES)
        build_without_model(folder)

    def attempt(job: Callable[[], object]) -> None:
        try:
            job()
        except (InputError, OSError) as error:
            refused.append(error)

    jobs = [
        lambda: erased(folder, users=["u3"]),
        lambda: grow("i1"),
        lambda: erased(tmp_path / "ws", items=["i2"]),
        lambda: compacted(folder, keep_days=0, keep_snapshots=1),
        lambda: grow("i4"),
    ]
    threads = [threading.Thread(target=attempt, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("run " in str(error) for error in refused), refused
    for item in ("i1", "i4"):  # the same deliveries again
        grow(item)
    work(folder)
    check_ids = histories_of(opened(built))["u3"]
    assert traces(folder, "u3", ids_of("u3", len(check_ids))) == set()
    assert sorted(states_of(folder)) == expected_ids(folder)
    assert verify(Workspace.open(str(folder))).problems == []
    assert sorted(histories_of(opened(folder))["u1"][-2:]) == [("i1", 10**6), ("i4", 10**6)]

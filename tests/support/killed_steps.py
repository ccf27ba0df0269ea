"""The steps of a memory that lives, each killed at a random moment and run again: a script.

Arguments: an empty folder, and the number of rounds. A round appends to the dataset, extracts, indexes, erases a user,
and compacts. Each step starts in a separate process, which is killed; the next one runs it to its end. A second
workspace has the same steps without kills. After each round both must have the same rows, and as many files of each
kind. The last line on stdout is the number of kills that came before the end of a step.

The process that starts them only imports: a fork of a process whose libraries have threads would not be safe.
"""

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from l2d_ray.index.sharding import ShardedIndex
from l2d_ray.memory.store import MemoryStore
from l2d_ray.memory.verify import verify
from l2d_ray.workspace import Workspace
from support.growing import Log, append, build_without_model, histories_of, prepare, random_log, titles_of
from support.keeping import AT_ONCE, compacted, erased, ids_of, opened, shape, traces
from support.small_memory import build, plan
from support.small_workspace import expected_ids, states_of

FIRST, NEW = 200, 12
LOG: Log = list(dict.fromkeys(random_log(800, users=20, items=8)))
TITLES = titles_of(LOG)
Step = Callable[[Path, int], object]


def delivery(number: int) -> Log:
    """Return what a round appends: interactions of users who are never erased."""
    first = FIRST + number * NEW
    return [(f"stays-{user}", item, time) for user, item, time in LOG[first : first + NEW]]


def leaver(user: str) -> str:
    """Return an id that no other bytes of a file equal by chance."""
    return f"{user}-who-leaves"


def start(folder: Path) -> None:
    prepare(folder, [(leaver(user), item, time) for user, item, time in LOG[:FIRST]], TITLES)
    build_without_model(folder, units=2)
    build(Workspace.open(str(folder)))


def compact(folder: Path, number: int) -> None:
    compacted(folder, **AT_ONCE)
    build(Workspace.open(str(folder)))  # what it removes with an index is built again


STEPS: tuple[Step, ...] = (
    lambda folder, number: append(opened(folder), delivery(number), TITLES),
    lambda folder, number: build_without_model(folder),
    lambda folder, number: build(Workspace.open(str(folder)), max_drift=9.0),
    lambda folder, number: erased(folder, users=[leaver(f"u{number}")]),
    compact,
)


def check(folder: Path, once: Path, number: int) -> None:
    """Assert that a round is done, and nothing more."""
    states, workspace = states_of(folder), Workspace.open(str(folder))
    assert sorted(states) == expected_ids(folder) == sorted(states_of(once))
    assert verify(workspace).problems == []
    assert histories_of(opened(folder)) == histories_of(opened(once))
    gone = f"u{number}"
    ids = ids_of(leaver(gone), sum(user == gone for user, _, _ in LOG[:FIRST]))
    assert traces(folder, leaver(gone), ids) == set()
    index = ShardedIndex.open(workspace, plan(workspace).manifest)
    assert sum(shard.num_rows for shard in index.shards) == len(states)
    assert MemoryStore(workspace).snapshot().rows == len(states)
    assert shape(folder) == shape(once)


def forked(work: Callable[..., object], *arguments: object, seconds: float | None = None) -> bool:
    """Run `work` in a child. Kill it after some seconds, if given; return whether that was before its end."""
    child = os.fork()
    if child == 0:
        try:
            work(*arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in ((0, -signal.SIGKILL) if seconds is not None else (0,)), status
    return status != 0


def main(folder: Path, rounds: int) -> int:
    chance, killed = random.Random(0), 0
    ours, once = folder / "ours", folder / "once"
    for one in (ours, once):
        forked(start, one)
    for number in range(rounds):
        for step in STEPS:
            started = time.monotonic()
            forked(step, once, number)
            killed += forked(step, ours, number, seconds=chance.uniform(0, time.monotonic() - started))
            forked(step, ours, number)
        forked(check, ours, once, number)
    return killed


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), int(sys.argv[2])))

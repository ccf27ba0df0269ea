"""A year of daily appends with a compaction a week and an erasure a month, by the default rules of retention."""

import os
from pathlib import Path

import pytest
from support.growing import append, build_without_model, histories_of, prepare, random_log, titles_of
from support.keeping import compacted, erased, opened
from support.small_workspace import expected_ids, states_of

from l2d_ray.data.versions import version_numbers, version_path
from l2d_ray.memory.store import MemoryStore, snapshot_path
from l2d_ray.memory.verify import verify
from l2d_ray.workspace import Workspace

DAYS, A_DAY, FIRST = 365, 5, 500


def pass_a_day(folder: Path) -> None:
    """Make all files a day older."""
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, times=(path.stat().st_mtime - 86_400,) * 2)


@pytest.mark.slow
@pytest.mark.long
def test_files_and_records_stay_few_and_small_for_a_year(tmp_path: Path) -> None:
    folder = tmp_path / "ws"
    log = list(dict.fromkeys(random_log(FIRST + DAYS * A_DAY, users=60, items=40)))
    titles, gone = titles_of(log), set[str]()
    prepare(folder, log[:FIRST], titles)
    build_without_model(folder)
    workspace = Workspace.open(str(folder))
    store, most, after_compaction = MemoryStore(workspace), 0, list[int]()
    for day in range(DAYS):
        pass_a_day(folder)
        new = [one for one in log[FIRST + day * A_DAY :][:A_DAY] if one[0] not in gone]
        append(opened(folder), new or [("other", "i1", log[-1][2])], titles)
        build_without_model(folder)
        most = max(most, len(workspace.files("")))
        if day % 30 == 29:
            gone.add(f"u{day // 30}")
            erased(folder, users=[f"u{day // 30}"])
        if day % 7 == 6:
            compacted(folder)
            after_compaction.append(len(workspace.files("")))
            records = snapshot_path(store.snapshot_numbers()[-1]), version_path(version_numbers(workspace)[0])
            assert all((folder / path).stat().st_size < 10_000 for path in records)
    # A week of files, and another that a reader may still have open.
    assert most < 200
    assert max(after_compaction[-10:]) <= max(after_compaction[2:12]) * 1.2
    assert len(store.snapshot().units) < 10
    assert len(opened(folder).generations) < 12
    left = {user: [] for user, _, _ in log if user not in gone} | {"other": []}
    assert histories_of(opened(folder)).keys() <= left.keys()
    assert sorted(states_of(folder)) == expected_ids(folder)
    assert verify(workspace).problems == []

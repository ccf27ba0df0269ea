"""jobs/erase.py and jobs/compact.py on Ray."""

from pathlib import Path

import pytest
from support.growing import append, build_without_model, histories_of, prepare, random_log, titles_of
from support.keeping import AT_ONCE, ids_of, opened, traces
from support.small_memory import build
from support.small_workspace import expected_ids, states_of

from l2d_ray.config import Config, EraseConfig, IndexConfig
from l2d_ray.distributed.compact import compact
from l2d_ray.distributed.erase import erase
from l2d_ray.errors import InputError
from l2d_ray.stages import checks
from l2d_ray.stages.settings import record_index
from l2d_ray.workspace import Workspace

LOG = list(dict.fromkeys(random_log(300, users=20, items=15)))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_user_is_erased_and_the_files_are_compacted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, users = tmp_path / "ws", tmp_path / "users.txt"
    users.write_text("u3\n")
    dataset = prepare(folder, LOG[:200], titles_of(LOG))
    build_without_model(folder)
    append(dataset, LOG[200:], titles_of(LOG))
    build_without_model(folder)
    build(Workspace.open(str(folder)), space="none", snapshot=1)
    record_index(Config(workspace=str(folder), index=IndexConfig(space="none")), 1)
    (folder / "reports").mkdir()
    (folder / "reports/evaluation.parquet").touch()
    ids = ids_of("u3", len(histories_of(opened(folder))["u3"]))

    config = Config(workspace=str(folder), erase=EraseConfig(users=str(users)))
    result = erase(config)
    assert (result.users, result.samples, result.rows) == (1, len(ids), len(ids))
    said = capsys.readouterr().err
    assert (
        f"1 users, {len(ids)} samples and {len(ids)} rows of the memory are gone; to have them in no file, run" in said
    )
    assert "these hold samples of users, too; delete them or make them again: reports/evaluation.parquet" in said
    (folder / "reports/evaluation.parquet").unlink()
    first = compact(config)
    assert (first.removed_snapshots, first.holding_erased) == (
        0,
        5,
    )  # versions 1 and 2; snapshots 1, 2 and, with its deletion vectors, 3
    assert "5 older snapshots and versions are kept for their readers, and hold what was erased; compact.keep_snap" in (
        capsys.readouterr().err
    )
    keep = config.replace({f"compact.{name}": value for name, value in AT_ONCE.items()})
    assert compact(keep).pinned == [1]
    assert (
        "snapshots [1] of the memory are kept, because their index was built last or is served; run jobs/build_index"
        in capsys.readouterr().err
    )
    build(Workspace.open(str(folder)), space="none")
    record_index(Config(workspace=str(folder), index=IndexConfig(space="none")), 4)
    assert (last := compact(keep)).pinned == []
    assert last.holding_erased == 0
    assert traces(folder, "u3", ids) == set()
    assert sorted(states_of(folder)) == expected_ids(folder)


def test_a_missing_dataset_or_file_is_refused_before_ray_starts(tmp_path: Path) -> None:
    config = Config(workspace=str(tmp_path / "ws"), erase=EraseConfig(users=str(tmp_path / "users.txt")))
    with pytest.raises(InputError, match=r"users\.txt: not found on this machine"):
        checks.erase(config)
    (tmp_path / "users.txt").write_text("u1")
    for check in (checks.erase, checks.compact):
        with pytest.raises(InputError, match=r"dataset\.json: not found; run jobs/prepare_data\.py first"):
            check(config)

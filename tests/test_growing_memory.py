import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.growing import append, build_memory, build_without_model, prepare, random_log, titles_of
from support.keeping import compacted
from support.small_memory import build
from support.small_workspace import config_of, expected_ids, states_of

from l2d_ray.config import Config
from l2d_ray.data.dataset import Dataset
from l2d_ray.encoding import identify_memory
from l2d_ray.errors import InputError
from l2d_ray.memory.manifest import Snapshot
from l2d_ray.memory.store import MemoryStore
from l2d_ray.memory.verify import verify
from l2d_ray.stages.evaluation import plan_evaluation
from l2d_ray.stages.extraction import UnitExtractor, plan_growth, plan_units
from l2d_ray.stages.index_plan import dataset_of, plan_index
from l2d_ray.workspace import Workspace

LOG = list(dict.fromkeys(random_log(900, users=30, items=25)))
TITLES = titles_of(LOG)
CUTS = (600, 700, 701, len(LOG))
SETTINGS = {"memory.units": 4, "history.max_items": 4, "history.stride": 3}


def settings(folder: Path, **changes: object) -> Config:
    return config_of(folder, **(SETTINGS | changes))


def grow(dataset: Dataset, start: int, stop: int) -> Dataset:
    return append(dataset, LOG[start:stop], TITLES)[0]


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Snapshot]]:
    """Return a workspace whose dataset and memory grew three times, and its snapshots."""
    folder = tmp_path_factory.mktemp("grown")
    dataset = prepare(folder, LOG[: CUTS[0]], TITLES)
    snapshots = [build_memory(settings(folder))]
    for start, stop in itertools.pairwise(CUTS):
        dataset = grow(dataset, start, stop)
        snapshots.append(build_memory(settings(folder)))
    return folder, snapshots


def assert_equals_one_built_at_once(folder: Path, other: Path, **changes: object) -> None:
    prepare(other, LOG, TITLES)
    build_memory(settings(other, **{"model.name": folder / "model"} | changes))
    states, expected = states_of(folder), states_of(other)
    assert states.keys() == expected.keys()
    for sample, state in states.items():
        np.testing.assert_allclose(state, expected[sample], rtol=1e-3, atol=1e-3)


def test_a_memory_that_grew_equals_one_built_at_once(grown: tuple[Path, list[Snapshot]], tmp_path: Path) -> None:
    folder, _ = grown
    assert sorted(states_of(folder)) == expected_ids(folder)
    assert_equals_one_built_at_once(folder, tmp_path)
    assert verify(Workspace.open(str(folder))).problems == []


def test_a_snapshot_has_the_units_of_the_one_before(grown: tuple[Path, list[Snapshot]]) -> None:
    folder, snapshots = grown
    store, dataset = MemoryStore(Workspace.open(str(folder))), Dataset.open(Workspace.open(str(folder)))
    assert [snapshot.dataset for snapshot in snapshots] == dataset.version.lineage
    for old, new in itertools.pairwise(snapshots):
        assert set(old.units) < set(new.units)
        assert store.snapshot(old.number) == old
    assert [len(snapshot.units) for snapshot in snapshots] == [4, 5, 6, 7]  # few samples are one unit


def test_growing_runs_the_new_samples_and_the_beginnings_of_their_windows(
    grown: tuple[Path, list[Snapshot]],
) -> None:
    folder, snapshots = grown
    units = MemoryStore(Workspace.open(str(folder))).units()
    (one,) = set(snapshots[2].units) - set(snapshots[1].units)
    assert units[one].rows == 1
    assert units[one].tokens < 7 * 12  # a window has at most 6 items of a few tokens


def test_building_again_runs_nothing(grown: tuple[Path, list[Snapshot]]) -> None:
    folder, snapshots = grown
    dataset, store = Dataset.open(Workspace.open(str(folder))), MemoryStore(Workspace.open(str(folder)))
    kept, units = plan_growth(settings(folder), dataset, snapshots[-1], store.units())
    assert (kept, units) == (snapshots[-1].units, [])
    assert build_memory(settings(folder)) == snapshots[-1]
    # Another number of units is a wish for what is to be built, and no reason to build again.
    assert plan_growth(settings(folder, **{"memory.units": 3}), dataset, snapshots[-1], store.units()) == (kept, [])


def test_a_snapshot_of_another_fraction_or_dataset_or_with_a_lost_unit_counts_as_none(
    grown: tuple[Path, list[Snapshot]],
) -> None:
    folder, snapshots = grown
    dataset, newest = Dataset.open(Workspace.open(str(folder))), snapshots[-1]
    units = plan_units(settings(folder), dataset)
    assert sorted(unit.name for unit in units) == newest.units
    assert plan_growth(settings(folder), dataset, None, []) == ([], units)
    assert plan_growth(settings(folder), dataset, newest, newest.units[1:]) == ([], units)
    other = newest.model_copy(update={"dataset": "another"})
    assert plan_growth(settings(folder), dataset, other, newest.units) == ([], units)
    half = settings(folder, **{"memory.sample_fraction": 0.5})
    kept, half_units = plan_growth(half, dataset, newest, newest.units)
    assert kept == []
    assert not {unit.name for unit in half_units} & set(newest.units)


def test_a_fraction_of_a_memory_grows(tmp_path: Path) -> None:
    folder = tmp_path / "grown"
    half = {"memory.sample_fraction": 0.5}
    dataset = prepare(folder, LOG[:700], TITLES)
    build_memory(settings(folder, **half))
    grow(dataset, 700, len(LOG))
    build_memory(settings(folder, **half))
    assert set(states_of(folder)) < set(expected_ids(folder))
    assert_equals_one_built_at_once(folder, tmp_path / "once", **half)


def test_several_versions_are_caught_up_with_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "grown"
    dataset = prepare(folder, LOG[:500], TITLES)
    planned = plan_units(settings(folder), dataset)
    dataset = grow(dataset, 500, 700)
    # A worker that starts after the dataset grew builds what was planned before.
    extractor = UnitExtractor(settings(folder), identify_memory(settings(folder)))
    assert [extractor.build(unit).unit for unit in planned] == [unit.name for unit in planned]
    grow(dataset, 700, len(LOG))
    snapshot = build_memory(settings(folder))
    assert (snapshot.number, len(snapshot.units)) == (1, 6)
    assert_equals_one_built_at_once(folder, tmp_path / "once")


def test_an_index_of_a_grown_memory_has_all_rows(grown: tuple[Path, list[Snapshot]], tmp_path: Path) -> None:
    folder, snapshots = grown
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    workspace = Workspace.open(str(tmp_path))
    plan, manifest = build(workspace, space="none")
    assert (manifest.rows, manifest.dataset) == (snapshots[-1].rows, Dataset.open(workspace).digest)
    assert dataset_of(plan).digest == snapshots[-1].dataset
    # The version of an older snapshot is still there.
    old = plan_index(settings(tmp_path, **{"index.snapshot": snapshots[0].number}))
    assert dataset_of(old).version.number == 1
    (tmp_path / "dataset/versions/4.json").unlink()
    with pytest.raises(InputError, match="snapshot 4 of the memory was built from another dataset; run"):
        dataset_of(plan)


def test_a_dataset_without_a_split_is_not_evaluated(tmp_path: Path) -> None:
    prepare(tmp_path, LOG, TITLES)
    evaluate = settings(tmp_path, **{"evaluate.recommenders": "most-popular"})
    with pytest.raises(InputError, match=r"dataset: no test samples; prepare the data with another data\.split"):
        plan_evaluation(evaluate)


def test_a_snapshot_from_before_merged_generations_counts_as_none(tmp_path: Path) -> None:
    folder = tmp_path / "ws"
    dataset = prepare(folder, LOG[:150], TITLES)
    build_without_model(folder)
    append(dataset, LOG[150:300], TITLES)
    build_without_model(folder)
    compacted(folder, keep_snapshots=5)
    for path in (folder / "memory/snapshots").iterdir():
        if path.name != "1.json":
            path.unlink()
    assert build_without_model(folder).rows == len(expected_ids(folder))

import itertools
from pathlib import Path

import pyarrow as pa
import pytest
from support.growing import append, histories_of, prepare, random_log, titles_of

from l2d_ray.core.samples import sample_ids
from l2d_ray.data.dataset import Dataset, write_part, write_version
from l2d_ray.data.samples import iter_samples, training_interactions
from l2d_ray.errors import InputError
from l2d_ray.schema import ITEMS, Split
from l2d_ray.workspace import Workspace

LOG = list(dict.fromkeys(random_log(600, users=30, items=20)))
TITLES = titles_of(LOG)
CUTS = (300, 400, 500, len(LOG))


@pytest.fixture
def versions(tmp_path: Path) -> list[Dataset]:
    """Return the versions of a dataset that grew three times."""
    found = [prepare(tmp_path / "grown", LOG[: CUTS[0]], titles_of(LOG[: CUTS[0]]))]
    for start, stop in itertools.pairwise(CUTS):
        found.append(append(found[-1], LOG[start:stop], TITLES)[0])
    return found


def test_a_grown_dataset_equals_one_that_was_prepared_at_once(versions: list[Dataset], tmp_path: Path) -> None:
    grown = Dataset.open(versions[0].workspace)
    assert grown.version == versions[-1].version

    once = prepare(tmp_path / "once", LOG, TITLES)
    assert grown.items().equals(once.items())
    assert pa.concat_tables(grown.iter_users()).equals(pa.concat_tables(once.iter_users()))
    assert pa.concat_tables(grown.iter_users(7, 21, 3)).equals(pa.concat_tables(once.iter_users(7, 21)))
    assert (grown.num_users, grown.num_samples(Split.TRAIN)) == (once.num_users, once.num_samples(Split.TRAIN))
    for name in ("items", "timestamps", "offsets", "is_target"):
        one, other = (getattr(training_interactions(dataset), name) for dataset in (grown, once))
        assert one.tolist() == other.tolist()


def test_each_sample_is_in_one_generation(versions: list[Dataset]) -> None:
    ids = [
        [sample for batch in iter_samples(generation, Split.TRAIN) for sample in batch.sample_ids.tolist()]
        for generation in versions[-1].generations
    ]
    assert [len(of_generation) for of_generation in ids] == [
        generation.num_samples(Split.TRAIN) for generation in versions[-1].generations
    ]
    every = [sample for of_generation in ids for sample in of_generation]
    assert len(set(every)) == len(every) == versions[-1].num_samples(Split.TRAIN)
    whole = list(iter_samples(versions[-1], Split.TRAIN))
    assert sorted(every) == sorted(sample for batch in whole for sample in batch.sample_ids.tolist())
    assert all((sample_ids(batch.user_hashes, batch.positions) == batch.sample_ids).all() for batch in whole)


def test_nothing_of_an_old_version_changes(versions: list[Dataset]) -> None:
    for old, new in itertools.pairwise(versions):
        again = Dataset.open(old.workspace, old.digest)
        assert again.version == old.version
        assert histories_of(again) == histories_of(old)
        assert new.items().slice(0, len(old.items())).equals(old.items())
        for user, history in histories_of(old).items():
            assert histories_of(new)[user][: len(history)] == history
    with pytest.raises(InputError, match=r"dataset\.json: has no version ffff; run jobs/build_memory\.py again"):
        Dataset.open(versions[0].workspace, "ffff")


def test_growing_writes_new_files_alone(versions: list[Dataset]) -> None:
    grown = versions[-1]
    root = Path(grown.workspace.path(""))
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    newest, _ = append(grown, [("u1", "i1", 10_000), ("nobody", "new", 10_000)], {"new": "A new title"} | TITLES)
    after = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    assert before.items() < after.items()
    new = {str(path.relative_to(root)) for path in after.keys() - before.keys()}
    assert new == {"dataset/versions/5.json", newest.version.item_files[-1], newest.generations[-1].parts[0].path}
    assert newest.generations[-1].num_users == 2


def test_of_two_runs_that_append_at_once_the_second_starts_again(versions: list[Dataset]) -> None:
    old = versions[-1]
    append(old, [("u1", "i1", 10_000)], TITLES)
    with pytest.raises(FileExistsError):
        append(old, [("u2", "i2", 10_000)], TITLES)
    grown, _ = append(Dataset.open(old.workspace), [("u2", "i2", 10_000)], TITLES)
    assert histories_of(grown)["u1"][-1] == ("i1", 10_000)
    assert histories_of(grown)["u2"][-1] == ("i2", 10_000)
    # The part of the second run was for version 5, too; the next version took no file from it.
    assert [path.split("/")[2] for path in sorted(part.path for part in grown.parts)[:4]] == ["2", "3", "4", "5"]


def test_a_crash_before_the_record_leaves_the_old_version(versions: list[Dataset]) -> None:
    old = versions[-1]
    users = next(old.iter_users())
    write_part(old.workspace, 3, users, old.version.number + 1)
    Path(old.workspace.path("dataset/histories/5/part-0.parquet.0123.tmp")).write_text("another run writes it")
    assert Dataset.open(old.workspace).version == old.version
    grown, _ = append(old, [("u1", "i1", 10_000)], TITLES)
    left = old.workspace.files("dataset/histories/5")
    assert left == ["dataset/histories/5/part-0.parquet.0123.tmp", grown.generations[-1].parts[0].path]


def test_a_new_preparation_replaces_all_versions(versions: list[Dataset]) -> None:
    workspace = versions[0].workspace
    stale = versions[-1]
    again = prepare(Path(workspace.path("")), LOG[:200], TITLES)
    assert again.version.number == 1
    assert workspace.files("dataset") == sorted(
        ["dataset/dataset.json", "dataset/items.parquet", *(part.path for part in again.parts)]
    )
    # A run that was appending to the old dataset comes too late.
    write_version(stale, ITEMS.empty_table(), 0, [], {}, 0)
    with pytest.raises(InputError, match=r"dataset/versions/5\.json: belongs to a dataset that was replaced meanwhile"):
        Dataset.open(Workspace.open(workspace.uri))


def test_a_damaged_version_is_named(versions: list[Dataset]) -> None:
    workspace = versions[0].workspace
    workspace.write_json("dataset/versions/4.json", {"number": 4})
    with pytest.raises(InputError, match=r"dataset/versions/4\.json: lineage: Field required; the file is damaged or"):
        Dataset.open(workspace)

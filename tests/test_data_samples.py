"""Samples of a dataset against the same rules on Python lists."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from l2d_ray.config import HistoryConfig
from l2d_ray.core.samples import sample_ids
from l2d_ray.data.dataset import Dataset, write_manifest, write_part
from l2d_ray.data.samples import choose_samples, iter_samples, training_interactions
from l2d_ray.errors import InputError
from l2d_ray.schema import HISTORIES, ITEMS, Split
from l2d_ray.workspace import Workspace

SPLITS = (Split.TRAIN, Split.VALID, Split.TEST)
WINDOW = HistoryConfig(max_items=4, stride=3)


def write(folder: Path, users: list[dict[str, Any]]) -> Dataset:
    """Make these users, in two parts, the dataset."""
    workspace = Workspace.open(str(folder))
    halves = users[: len(users) // 2], users[len(users) // 2 :]
    parts = [write_part(workspace, n, pa.Table.from_pylist(half, schema=HISTORIES)) for n, half in enumerate(halves)]
    write_manifest(workspace, ITEMS.empty_table(), parts, {})
    return Dataset.open(workspace)


def random_users(count: int = 2_500) -> list[dict[str, Any]]:
    """Return histories of 0 to 12 items, with every mixture of splits, and users without any sample."""
    random = np.random.default_rng(3)
    users = []
    for number in range(count):
        length = int(random.integers(0, 13))
        later = np.sort(random.integers(0, 4, max(length - 1, 0)))
        users.append(
            {
                "user_id": f"u{number}",
                "user_hash": int(random.integers(-(2**63), 2**63 - 1)),
                "item_indices": random.integers(0, 50, length).tolist(),
                "timestamps": random.integers(0, 2**40, length).tolist(),
                "splits": [Split.NONE, *later.tolist()][:length],
            }
        )
    return users


USERS = random_users()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write(tmp_path_factory.mktemp("dataset"), USERS)


def expected(split: Split, users: list[dict[str, Any]] = USERS) -> list[tuple[Any, ...]]:
    """Id, user hash, history, target and time of every sample."""
    return [
        (
            int(sample_ids(np.array([user["user_hash"]]), np.array([position]))[0]),
            user["user_hash"],
            user["item_indices"][:position],
            user["item_indices"][position],
            user["timestamps"][position],
        )
        for user in users
        for position, of in enumerate(user["splits"])
        if of == split
    ]


def as_tuples(samples: Any) -> list[tuple[Any, ...]]:
    return [(s.sample_id, s.user_hash, s.history.tolist(), s.target, s.timestamp) for s in samples]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("start", "stop"), [(0, None), (0, 1), (700, 2_100), (1_249, 1_251), (5, 5)])
def test_the_samples_of_a_range_of_users_are_those_of_a_naive_reference(
    dataset: Dataset, split: Split, start: int, stop: int | None
) -> None:
    batches = list(iter_samples(dataset, split, start, stop))
    assert all(len(batch) for batch in batches)
    found = [sample for batch in batches for sample in batch.records()]
    assert as_tuples(found) == expected(split, USERS[start:stop])


def test_a_batch_says_position_and_window_of_each_sample(dataset: Dataset) -> None:
    for batch in iter_samples(dataset, Split.TRAIN):
        starts = batch.window_starts(WINDOW)
        for sample, position, start, stop in zip(batch.records(), batch.positions, starts, batch.stops, strict=True):
            assert position == sample.history.size
            first = max(0, (position - 4) // 3 * 3)
            assert batch.items[start:stop].tolist() == sample.history[first:].tolist()


def test_a_share_keeps_or_drops_windows_as_a_whole(dataset: Dataset) -> None:
    def windows(fraction: float) -> dict[tuple[int, int], int]:
        """Return the number of samples of each window, by user and start."""
        found: dict[tuple[int, int], int] = {}
        for batch in iter_samples(dataset, Split.TRAIN):
            some = batch.in_fraction(WINDOW, fraction)
            for user, start in zip(some.user_hashes.tolist(), some.window_starts(WINDOW) - some.begins, strict=True):
                found[user, int(start)] = found.get((user, int(start)), 0) + 1
        return found

    few, more, every = windows(0.3), windows(0.6), windows(1.0)
    assert few.items() < more.items() < every.items()
    assert abs(len(few) / len(every) - 0.3) < 0.03
    assert sum(every.values()) == len(expected(Split.TRAIN))


def test_samples_are_also_given_user_by_user(dataset: Dataset) -> None:
    (*parts,) = (part for batch in iter_samples(dataset, Split.TRAIN) for part in batch.by_user())
    assert len(parts) == sum(Split.TRAIN in user["splits"] for user in USERS)
    assert all(np.unique(part.user_hashes).size == 1 for part in parts)
    assert as_tuples(sample for part in parts for sample in part.records()) == expected(Split.TRAIN)


def test_the_samples_with_the_smallest_ids_are_chosen_so_that_fewer_are_a_part_of_more(dataset: Dataset) -> None:
    ranked = sorted(expected(Split.TEST), key=lambda sample: sample[0] % 2**64)
    for limit in (0, 40, 200, 10**6):
        assert as_tuples(choose_samples(dataset, Split.TEST, limit)) == ranked[:limit]


def test_training_interactions_end_with_the_last_training_target_of_each_user(dataset: Dataset) -> None:
    found = training_interactions(dataset)
    assert found.items.dtype == np.dtype(np.int32)
    cut = [sum(split <= Split.TRAIN for split in user["splits"]) for user in USERS]
    users = [(user, stop) for user, stop in zip(USERS, cut, strict=True) if Split.TRAIN in user["splits"]]
    assert found.items.tolist() == [item for user, stop in users for item in user["item_indices"][:stop]]
    assert found.timestamps.tolist() == [time for user, stop in users for time in user["timestamps"][:stop]]
    assert np.diff(found.offsets).tolist() == [stop for _, stop in users]
    assert found.positions.tolist() == [position for _, stop in users for position in range(stop)]


def test_training_pairs_are_those_of_training_samples_only(dataset: Dataset) -> None:
    found = training_interactions(dataset)
    assert found.lasts.dtype == found.targets.dtype == np.dtype(np.int32)
    pairs = [(history[-1], target, time) for _, _, history, target, time in expected(Split.TRAIN)]
    columns = (found.lasts.tolist(), found.targets.tolist(), found.target_timestamps.tolist())
    assert list(zip(*columns, strict=True)) == pairs


def test_a_training_sample_without_a_history_is_no_pair(tmp_path: Path) -> None:
    row = {"user_id": "u", "user_hash": 1, "timestamps": [1, 2], "splits": [Split.TRAIN, Split.TRAIN]}
    found = training_interactions(write(tmp_path, [row | {"item_indices": items} for items in ([7, 8], [9, 10])]))
    assert (found.lasts.tolist(), found.targets.tolist()) == ([7, 9], [8, 10])
    assert found.items.tolist() == [7, 8, 9, 10]


def test_a_dataset_without_training_samples_has_no_training_interactions(tmp_path: Path) -> None:
    row = {"user_id": "u", "user_hash": 1, "item_indices": [7, 8], "timestamps": [1, 2], "splits": [0, Split.TEST]}
    found = training_interactions(write(tmp_path, [row, row | {"user_id": "v"}]))
    assert (found.items.size, found.targets.size, found.offsets.tolist()) == (0, 0, [0])


def test_lists_of_different_lengths_are_refused(tmp_path: Path) -> None:
    row = {"user_id": "u", "user_hash": 1, "item_indices": [1, 2], "timestamps": [1, 2], "splits": [0, 1]}
    dataset = write(tmp_path, [row, row | {"user_id": "v", "timestamps": [1]}])
    with pytest.raises(InputError, match=r"/dataset: user 'v': lists of different lengths; run jobs/prepare_data"):
        list(iter_samples(dataset, Split.TRAIN))

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from support.growing import Log, append, histories_of, prepare, random_log, titles_of

from l2d_ray.data.catalogue import Catalogue
from l2d_ray.data.dataset import Dataset
from l2d_ray.data.growth import CLOCK_SKEW, grow_catalogue, latest_time
from l2d_ray.data.histories import BLOCK
from l2d_ray.schema import ITEMS, Split

BASE: Log = [("ann", "a", 10), ("ann", "b", 20), ("ben", "a", 15), ("ben", "c", 25)]
TITLES = {name: f"Title {name}" for name in "abcdef"}


@pytest.fixture
def base(tmp_path: Path) -> Dataset:
    return prepare(tmp_path, BASE, TITLES)


def test_new_interactions_go_on_after_the_old_ones(base: Dataset) -> None:
    grown, refused = append(base, [("cat", "d", 5), ("ann", "d", 30), ("ann", "a", 30)], TITLES)
    assert histories_of(grown) == {
        "ann": [("a", 10), ("b", 20), ("d", 30), ("a", 30)],
        "ben": [("a", 15), ("c", 25)],
        "cat": [("d", 5)],
    }
    assert refused == {"repeated": 0, "late": 0, "k_core": 0}
    assert grown.items()["item_id"].to_pylist() == list("abcd")
    assert (grown.num_users, grown.num_samples(Split.TRAIN)) == (3, 4)


def test_the_same_file_again_changes_nothing(base: Dataset) -> None:
    log = [*BASE, ("ann", "d", 30), ("ann", "d", 30)]
    grown, refused = append(base, log, TITLES)
    assert refused == {"repeated": 5, "late": 0, "k_core": 0}
    files = grown.workspace.files("dataset")
    again, refused = append(grown, log, TITLES)
    assert again is grown
    assert refused == {"repeated": 6, "late": 0, "k_core": 0}
    assert grown.workspace.files("dataset") == files


def test_a_late_interaction_is_refused_and_one_of_the_same_time_is_not(base: Dataset) -> None:
    grown, refused = append(base, [("ann", "c", 19), ("ann", "c", 20), ("ben", "d", 24)], TITLES)
    assert refused == {"repeated": 0, "late": 2, "k_core": 0}
    assert histories_of(grown)["ann"] == [("a", 10), ("b", 20), ("c", 20)]
    assert histories_of(grown)["ben"] == [("a", 15), ("c", 25)]
    assert grown.items()["item_id"].to_pylist() == list("abc")  # d did not enter


def test_a_new_user_or_item_enters_with_the_delivery_that_has_enough_of_it(tmp_path: Path) -> None:
    log = [(user, item, time) for time, user in enumerate(("ann", "ben", "cat")) for item in "abc"]
    base = prepare(tmp_path, log, TITLES, k=3)
    assert (base.num_users, len(base.items())) == (3, 3)
    # A known user and a known item need no number.
    first: Log = [("ann", "a", 10), ("ben", "d", 11), ("dan", "a", 12), ("dan", "b", 13)]
    grown, refused = append(base, first, TITLES, k=3)
    assert refused == {"repeated": 0, "late": 0, "k_core": 3}
    assert [item for item, _ in histories_of(grown)["ann"]] == list("abca")
    # A longer piece of the log has enough of the others.
    longer: Log = [*first, ("dan", "d", 14), ("ann", "d", 15), ("cat", "d", 16)]
    grown, refused = append(grown, longer, TITLES, k=3)
    assert refused == {"repeated": 1, "late": 0, "k_core": 0}
    assert [item for item, _ in histories_of(grown)["dan"]] == list("abd")
    assert [item for item, _ in histories_of(grown)["ben"]] == list("abcd")
    assert grown.items()["item_id"].to_pylist() == list("abcd")


def test_a_changed_title_is_not_taken_and_a_deleted_item_stays(base: Dataset) -> None:
    titles = {"b": "Another title", "d": "Title d"}  # a and c are no longer in the file
    grown, _ = append(base, [("ann", "d", 30), ("ben", "a", 30)], titles)
    assert grown.items().to_pylist() == [
        {"item_index": index, "item_id": name, "title": f"Title {name}"} for index, name in enumerate("abcd")
    ]
    assert grown.version.changed_titles == 1
    assert histories_of(grown)["ben"][-1] == ("a", 30)


def test_an_item_whose_title_was_refused_enters_with_a_better_one() -> None:
    items = pa.table([[0], ["a"], ["Title a"]], schema=ITEMS)
    given = Catalogue(pa.array(["b", "a", "c"]), pa.array(["x", "Title", "Title c"]), np.array([2, 3, 0], np.uint8))
    catalogue, changed = grow_catalogue(items, given)
    assert (catalogue.item_ids.to_pylist(), catalogue.titles.to_pylist()) == (list("abc"), ["Title a", "x", "Title c"])
    assert catalogue.verdicts.tolist() == [0, 2, 0]
    assert changed == 1


@pytest.mark.parametrize("units", [1, 1_000, 1_000_000, 1_000_000_000])
def test_the_clock_has_the_unit_of_the_dataset(units: int) -> None:
    now = time.time()
    users = pa.table([["u"], [1], [[0]], [[int((now - 1e6) * units)]]], schema=BLOCK)
    assert -1 <= latest_time([users]) / units - now - CLOCK_SKEW < 60
    assert latest_time([]) > now


def naive(held: dict[str, list[tuple[str, int]]], items: set[str], log: Log, k: int) -> dict[str, int]:
    """Add a delivery to `held` and `items` by the same rules, one interaction at a time."""
    refused = {"repeated": 0, "late": 0, "k_core": 0}
    fresh: Log = []
    seen = set()
    for user, item, moment in sorted(log, key=lambda row: row[2]):
        old = held.get(user, [])
        if (item, moment) in old or (user, item, moment) in seen:
            refused["repeated"] += 1
        elif old and moment < old[-1][1]:
            refused["late"] += 1
        else:
            fresh.append((user, item, moment))
        seen.add((user, item, moment))
    users, known = set(held), set(items)
    while True:
        of_user = {user: sum(row[0] == user for row in fresh) for user, _, _ in fresh}
        of_item = {item: sum(row[1] == item for row in fresh) for _, item, _ in fresh}
        stay = [
            (user, item, moment)
            for user, item, moment in fresh
            if (user in users or of_user[user] >= k) and (item in known or of_item[item] >= k)
        ]
        if len(stay) == len(fresh):
            break
        refused["k_core"] += len(fresh) - len(stay)
        fresh = stay
    for user, item, moment in fresh:
        held.setdefault(user, []).append((item, moment))
        items.add(item)
    return refused


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_deliveries_that_overlap_equal_a_naive_reference(tmp_path: Path, k: int, seed: int) -> None:
    log = random_log(400, users=25, items=15, seed=seed)
    titles = titles_of(log)
    dataset = prepare(tmp_path, log[:100], titles, k)
    held, items = histories_of(dataset), set(dataset.items()["item_id"].to_pylist())
    for start, stop in ((80, 180), (150, 260), (200, 400), (0, 400)):
        delivery = [log[row] for row in np.random.default_rng(seed).permutation(np.arange(start, stop))]
        delivery.sort(key=lambda row: row[2])
        dataset, refused = append(dataset, delivery, titles, k)
        assert refused == naive(held, items, delivery, k)
        assert histories_of(dataset) == held
        assert set(dataset.items()["item_id"].to_pylist()) == items
    assert dataset.version.number > 2

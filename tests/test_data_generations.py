from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from l2d_ray.data.dataset import write_part
from l2d_ray.data.generations import Generation, merge, newest
from l2d_ray.schema import HISTORIES, Split
from l2d_ray.workspace import Workspace

User = tuple[int, str]


def table(histories: dict[User, tuple[int, int]]) -> pa.Table:
    """Return a generation: by hash and id, the number of held interactions and the length of the history."""
    rows = [
        {
            "user_id": user_id,
            "user_hash": user_hash,
            "item_indices": list(range(length)),
            "timestamps": list(range(length)),
            "splits": [Split.TRAIN if position >= max(held, 1) else Split.NONE for position in range(length)],
        }
        for (user_hash, user_id), (held, length) in sorted(histories.items())
    ]
    return pa.Table.from_pylist(rows, schema=HISTORIES)


def random_generations(seed: int, count: int) -> tuple[list[pa.Table], dict[User, int]]:
    """Return generations in which histories grow, and the final lengths. Hashes collide often."""
    random = np.random.default_rng(seed)
    lengths: dict[User, int] = {}
    generations = []
    for _ in range(count):
        users = {(int(number) % 20, f"u{number}") for number in random.integers(0, 60, 25)}
        grown = {user: (lengths.get(user, 0), lengths.get(user, 0) + int(random.integers(1, 5))) for user in users}
        lengths |= {user: length for user, (_, length) in grown.items()}
        generations.append(table(grown))
    return generations, lengths


def pieces(generation: pa.Table, size: int) -> Iterator[pa.Table]:
    return (generation.slice(at, size) for at in range(0, len(generation), size))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1, 4, 100])
def test_the_newest_history_of_each_user_has_all_splits(seed: int, size: int) -> None:
    generations, lengths = random_generations(seed, 4)
    expected = table({user: (0, length) for user, length in lengths.items()})
    assert newest(generations).equals(expected)
    merged = list(merge([pieces(generation, size) for generation in generations]))
    assert pa.concat_tables(merged).equals(expected)
    assert len(merged) > 1 or size == 100


def test_a_generation_alone_stays_as_it_is() -> None:
    only = table({(1, "a"): (0, 3), (1, "b"): (2, 4)})
    assert newest([only]).equals(only)
    assert pa.concat_tables(merge([pieces(only, 1)])).equals(only)
    assert newest([HISTORIES.empty_table()]).num_rows == 0


def test_users_are_found_without_reading_other_row_groups(tmp_path: Path) -> None:
    users = {(number, f"u{number}"): (0, 2) for number in range(-15_000, 10_000)}
    workspace = Workspace.open(str(tmp_path))
    part, _ = write_part(workspace, 0, table(users))
    generation = Generation(workspace, "digest", len(users), [part])
    path = tmp_path / part.path
    # Damage the first of three row groups.
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(0)
    content = bytearray(path.read_bytes())
    content[4 : 4 + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    path.write_bytes(content)
    ids = pa.array(["u7000", "u-5000", "nobody", "u9999"])
    found = generation.find_users(ids, np.array([-5_000, 3, 7_000, 9_999]))
    assert found["user_id"].to_pylist() == ["u-5000", "u7000", "u9999"]
    with pytest.raises(OSError, match=r"\S"):
        generation.find_users(ids, np.array([-15_000]))

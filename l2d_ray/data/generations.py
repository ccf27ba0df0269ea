"""The histories of a dataset as they are on disk: a generation of Parquet files for each version that added some.

A generation holds the whole history of each user who is new or has new interactions, and replaces the user's history of
earlier generations. Its positions that they hold have the split NONE, so that each sample is in one generation. All
users of a generation, over its parts, are in the order of (user_hash, user_id).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from l2d_ray.data.histories import Lists, as_lists, first_rows
from l2d_ray.errors import InputError
from l2d_ray.schema import HISTORIES, Split
from l2d_ray.workspace import Workspace

GROUP_USERS = 10_000
"""Users of a row group, at most."""
_HASH = HISTORIES.get_field_index("user_hash")


@dataclass(frozen=True)
class Part:
    """Entry of a record for one file of histories."""

    path: str
    users: int
    interactions: int
    """Interactions in the file, also those that earlier generations hold."""
    samples: dict[str, int]
    """Number of samples by the lower-case name of the split."""


@dataclass(frozen=True)
class Generation:
    """Reader of the histories that one version of a dataset added."""

    workspace: Workspace
    digest: str
    """Digest of the version."""
    new_users: int
    """Users that no earlier generation has."""
    parts: list[Part]

    @property
    def num_users(self) -> int:
        """Number of users in all parts."""
        return sum(part.users for part in self.parts)

    def num_samples(self, split: Split) -> int:
        """Return the number of samples of one split."""
        return sum(part.samples[split.name.lower()] for part in self.parts)

    def iter_users(self, start: int = 0, stop: int | None = None, batch_users: int = 1_000) -> Iterator[pa.Table]:
        """Yield users start to stop - 1 of the generation as tables (`schema.HISTORIES`) of at most `batch_users` rows.

        Only the row groups that hold these users are read, one after the other.
        """
        stop = self.num_users if stop is None else min(stop, self.num_users)
        first = 0
        for part in self.parts:
            if first < stop and first + part.users > start:
                yield from self._part_users(part, max(start - first, 0), min(stop - first, part.users), batch_users)
            first += part.users

    def find_users(self, user_ids: pa.Array, user_hashes: NDArray[np.int64]) -> pa.Table:
        """Return the histories of those of some users that the generation has, in its order.

        `user_hashes` are the hashes of the users, ascending. Only the row groups whose range of hashes has one of them
        are read.
        """
        found = [HISTORIES.empty_table()]
        for part in self.parts:
            with open_part(self.workspace, part.path) as stream:
                file = pq.ParquetFile(stream)
                for group in range(file.num_row_groups):
                    span = file.metadata.row_group(group).column(_HASH).statistics
                    if np.searchsorted(user_hashes, span.min) < np.searchsorted(user_hashes, span.max, side="right"):
                        users = file.read_row_group(group).cast(HISTORIES)
                        found.append(users.filter(pc.is_in(users["user_id"], value_set=user_ids)))
        return pa.concat_tables(found)

    def _part_users(self, part: Part, start: int, stop: int, batch_users: int) -> Iterator[pa.Table]:
        with open_part(self.workspace, part.path) as stream:
            file = pq.ParquetFile(stream)
            first = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if first < stop and first + rows > start:
                    table = file.read_row_group(group).cast(HISTORIES)
                    table = table.slice(max(start - first, 0), min(stop, first + rows) - max(start, first))
                    yield from (table.slice(at, batch_users) for at in range(0, len(table), batch_users))
                first += rows


def open_part(workspace: Workspace, path: str) -> pa.NativeFile:
    """Open a file that a dataset lists. Raises InputError if it is missing."""
    try:
        return workspace.filesystem.open_input_file(workspace.path(path))
    except FileNotFoundError:
        raise InputError(
            f"{workspace.path(path)}: not found, but the dataset lists it; run jobs/prepare_data.py again"
        ) from None


def merge(generations: Sequence[Iterator[pa.Table]]) -> Iterator[pa.Table]:
    """Yield the `newest` histories of generations, from old to new, in pieces of about a table of each."""
    nothing = HISTORIES.empty_table()
    heads = [next(stream, nothing) for stream in generations]
    while pending := [head for head in heads if len(head)]:
        bound = min(_last_hash(head) for head in pending)
        pieces = []
        for number, stream in enumerate(generations):
            head = heads[number]
            # The next table may have another user with the hash `bound`.
            while len(head) and _last_hash(head) <= bound and len(more := next(stream, nothing)):
                head = pa.concat_tables([head, more])
            size = int(np.searchsorted(head["user_hash"].to_numpy(), bound, side="right"))
            pieces.append(head.slice(0, size))
            heads[number] = head.slice(size)
        yield newest(pieces)


def newest(generations: Sequence[pa.Table]) -> pa.Table:
    """Return the newest history of each user in tables (`schema.HISTORIES`) from old to new.

    Users are in the order of (user_hash, user_id). A position has the split of the generation that added it.
    """
    ages = np.repeat(np.arange(len(generations)), [len(table) for table in generations])
    order = [(name, "ascending") for name in ("user_hash", "user_id", "age")]
    users = pa.concat_tables(generations).append_column("age", pa.array(ages)).sort_by(order).drop_columns("age")
    is_last = np.append(first_rows(users), True)[1:]
    if is_last.all():
        return users
    splits = Lists.of(users["splits"])
    newest_row = np.flatnonzero(is_last)[np.cumsum(is_last) - is_last]
    place_in_newest = np.repeat(splits.offsets[newest_row], splits.lengths) + splits.positions
    merged = splits.values.copy()
    np.maximum.at(merged, place_in_newest, splits.values)
    column = HISTORIES.get_field_index("splits")
    users = users.set_column(column, HISTORIES.field(column), as_lists(splits.offsets, merged, pa.int8()))
    return users.filter(pa.array(is_last))


def _last_hash(users: pa.Table) -> int:
    return int(users["user_hash"][-1].as_py())

"""The CSV files of D3 and BIGRec (arXiv 2406.14900): a folder with train, valid and test, kept as published.

Each row is one sample: its target (`item_asin`, `timestamp`) and the last items before it as Python lists
(`item_asins`, `history_timestamp`). The file of a row is its split. No filter applies, and there is no new split.
"""

import ast
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from l2d_ray.config import Config
from l2d_ray.data import columns
from l2d_ray.data.delimited import read_delimited
from l2d_ray.data.files import children, file_name, join
from l2d_ray.data.histories import BLOCK, Lists, as_lists
from l2d_ray.errors import InputError
from l2d_ray.schema import Split

NEEDS = ("interactions",)
SPLITS = {"train": Split.TRAIN, "valid": Split.VALID, "test": Split.TEST}
"""Folder, or start of the file name, of each split, in the order of time."""

_REMEDY = "give the CSV files as D3 or BIGRec wrote them"


def read_items(config: Config) -> Iterator[pa.Table]:
    """Yield every item of the rows, in the order of D3's numbers (`item_id`).

    An item that is never a target is in the history of its user's first row, so only those lists are parsed.
    """
    known: dict[str, tuple[int, str]] = {}
    users: set[str] = set()
    wanted = ("user_id", "item_asins", "history_item_id", "history_item_title", "item_asin", "item_id", "item_title")
    for path in interaction_files(config):
        for first, chunk in read_delimited(path, wanted, remedy=_REMEDY):
            numbers = columns.whole_numbers(chunk["item_id"], path, "item_id", first, parse=True).to_pylist()
            asins = columns.ids(chunk["item_asin"], path, "item_asin", first).to_pylist()
            for asin, number, title in zip(asins, numbers, chunk["item_title"].to_pylist(), strict=True):
                known.setdefault(asin, (number, title))
            for row, values in enumerate(zip(*(chunk[name].to_pylist() for name in wanted[:4]), strict=True), first):
                if values[0] not in users:
                    users.add(values[0])
                    _add_history(known, path, row, values)
    ordered = sorted(known.items(), key=lambda entry: entry[1])
    ids = pa.array([asin for asin, _ in ordered], pa.string())
    yield columns.items(ids, pa.array([title for _, (_, title) in ordered], pa.string()))


def interaction_files(config: Config) -> list[str]:
    """Return the files of train, valid and test, in this order: `train/*.csv` or `train*.csv`, and so on."""
    folder = str(config.data.interactions)
    return [_split_file(folder, name) for name in SPLITS]


def read_interactions(path: str, _config: Config) -> Iterator[pa.Table]:
    """Yield the targets, with the columns `history` (item ids) and `history_timestamps` in addition."""
    wanted = ("user_id", "item_asin", "timestamp", "item_asins", "history_timestamp")
    for row, chunk in read_delimited(path, wanted, remedy=_REMEDY):
        table = columns.interactions(
            columns.ids(chunk["user_id"], path, "user_id", row),
            columns.ids(chunk["item_asin"], path, "item_asin", row),
            columns.whole_numbers(chunk["timestamp"], path, "timestamp", row, parse=True),
            row,
        )
        history = _lists(chunk["item_asins"], path, "item_asins", row, str)
        times = _lists(chunk["history_timestamp"], path, "history_timestamp", row, int)
        yield table.append_column("history", pa.array(history, pa.list_(pa.string()))).append_column(
            "history_timestamps", pa.array(times, pa.list_(pa.int64()))
        )


def group(samples: pa.Table, find: Callable[[pa.Array], NDArray[np.int32]], files: Sequence[str]) -> pa.Table:
    """Return histories with `splits` from the samples of `read_interactions` (see `sources.PublishedSource`).

    A user's history is the history of the first sample, followed by the targets. Raises InputError, which names the row
    in `files`, for a sample whose history does not match the items before it.
    """
    ordered = samples.sort_by([(name, "ascending") for name in ("user_hash", "user_id", "timestamp", "file", "row")])
    asins = Lists.of(ordered["history"])
    ordered = ordered.append_column(
        "found", as_lists(asins.offsets, find(pa.array(asins.values, pa.string())), pa.int32())
    )
    users = [_sequence(list(rows), files) for _, rows in groupby(ordered.to_pylist(), key=lambda row: row["user_id"])]
    offsets = np.cumsum([0, *(len(user.items) for user in users)])
    items = np.array([item for user in users for item in user.items], dtype=np.int32)
    times = np.array([time for user in users for time in user.times], dtype=np.int64)
    splits = np.array([split for user in users for split in user.splits], dtype=np.int8)
    block = pa.table(
        [
            pa.array([user.user_id for user in users], pa.string()),
            pa.array([user.user_hash for user in users], pa.int64()),
            as_lists(offsets, items, pa.int32()),
            as_lists(offsets, times, pa.int64()),
        ],
        schema=BLOCK,
    )
    return block.append_column("splits", as_lists(offsets, splits, pa.int8()))


@dataclass(frozen=True)
class _User:
    user_id: str
    user_hash: int
    items: list[int]
    times: list[int]
    splits: list[int]


def _sequence(rows: list[dict[str, Any]], files: Sequence[str]) -> _User:
    first = rows[0]
    items, times = list(first["found"]), list(first["history_timestamps"])
    splits = [int(Split.NONE)] * len(items)
    for row in rows:
        history, split = row["found"], int(tuple(SPLITS.values())[row["file"]])
        if min(history, default=0) < 0:
            raise InputError(
                f"{files[row['file']]}: row {row['row']}: item_asins={str(row['history'])[:60]} has items that are"
                f" neither a target nor in the first row of user {row['user_id']!r}; {_REMEDY}, in the order of time"
            )
        if not history or items[-len(history) :] != history or len(times) != len(items) or split < splits[-1]:
            raise InputError(
                f"{files[row['file']]}: row {row['row']}: item_asins={str(row['history'])[:60]} does not continue"
                f" the earlier rows of user {row['user_id']!r}; {_REMEDY}"
            )
        items.append(row["item"])
        times.append(row["timestamp"])
        splits.append(split)
    return _User(first["user_id"], first["user_hash"], items, times, splits)


def _add_history(known: dict[str, tuple[int, str]], path: str, row: int, values: tuple[Any, ...]) -> None:
    asins = _list(values[1], path, "item_asins", row, str)
    numbers = _list(values[2], path, "history_item_id", row, int)
    titles = _list(values[3], path, "history_item_title", row, str)
    if not len(asins) == len(numbers) == len(titles):
        raise InputError(
            f"{path}: row {row}: item_asins, history_item_id and history_item_title differ in length; {_REMEDY}"
        )
    for asin, number, title in zip(asins, numbers, titles, strict=True):
        known.setdefault(asin, (number, title))


def _lists(column: pa.ChunkedArray, path: str, name: str, first: int, kind: type) -> list[list[Any]]:
    return [_list(text, path, name, row, kind) for row, text in enumerate(column.to_pylist(), start=first)]


def _list(text: str, path: str, name: str, row: int, kind: type) -> list[Any]:
    """Return the Python list in a cell's text."""
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        values = None
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise InputError(f"{path}: row {row}: {name}={text[:40]!r} is not a list of {kind.__name__}; {_REMEDY}")
    return values


def _split_file(folder: str, name: str) -> str:
    found = [path for path in children("data.interactions", folder) if file_name(path).startswith(name)]
    if not found:
        found = children("data.interactions", join(folder, name))
    found = [path for path in found if file_name(path).removesuffix(".gz").endswith(".csv")]
    if len(found) != 1:
        raise InputError(f"data.interactions={folder!r}: {len(found)} CSV files of {name}, not 1; {_REMEDY}")
    return found[0]

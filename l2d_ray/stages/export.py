"""The export of a dataset for other libraries of recommenders: the same samples, splits and items, in their formats.

`jobs/export_samples.py` lists the files. All are written as streams, some users at a time.

Shapes: N samples, U users, H interactions.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from l2d_ray.config import Config
from l2d_ray.core.arrays import IntArray
from l2d_ray.core.samples import sample_ids
from l2d_ray.core.times import units_per_second
from l2d_ray.data.dataset import SAMPLE_SPLITS, Dataset
from l2d_ray.data.files import join
from l2d_ray.data.histories import Lists, without_erased
from l2d_ray.errors import InputError
from l2d_ray.schema import Split
from l2d_ray.workspace import Workspace

SAMPLES = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("user_id", pa.string()),
        ("position", pa.int64()),
        ("split", pa.string()),
        ("history", pa.list_(pa.string())),
        ("target", pa.string()),
        ("timestamp", pa.int64()),
    ]
)
"""`samples.parquet`: the items of a user before a position, oldest first, and the item at the position."""

INTERACTIONS = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("weight", pa.float32()),
        ("datetime", pa.timestamp("us")),
        ("timestamp", pa.int64()),
        ("split", pa.string()),
    ]
)
"""`interactions.parquet`: every interaction. Its split is that of the sample whose target it is; `none` for the first
item of a user."""

RECBOLE_ITEMS = 50
"""Items of a history in RecBole's files, the last ones; RecBole's MAX_ITEM_LIST_LENGTH by default."""

_BATCH_USERS = 100
_SPLIT_NAMES = np.array([split.name.lower() for split in Split], dtype=object)
_INTERACTION_HEADER = "user_id:token\titem_id:token\ttimestamp:float\n"
_SAMPLE_HEADER = "user_id:token\titem_id_list:token_seq\titem_id:token\ttimestamp:float\n"
_ITEM_HEADER = "item_id:token\ttitle:token_seq\n"


@dataclass(frozen=True)
class ExportResult:
    """Numbers of what was written, and where it is."""

    users: int
    items: int
    interactions: int
    train: int
    """Number of training samples."""
    valid: int
    test: int
    folder: str
    """Location of the files."""
    seconds: float


def export_samples(config: Config) -> ExportResult:
    """Write the files of `jobs/export_samples.py`.

    Raises InputError if there is no dataset, and for an id that RecBole's files cannot hold.
    """
    started = time.monotonic()
    workspace = Workspace.open(config.workspace)
    dataset, folder = Dataset.open(workspace), config.export.folder or join(workspace.uri, "export")
    target, items = Workspace.open(folder), dataset.items()
    with target.create("items.parquet") as stream:
        pq.write_table(items, stream, compression="zstd")
    item_ids = _for_recbole(items["item_id"].combine_chunks(), "item_id")
    with target.create("recbole/recbole.item") as stream:
        _write_lines(stream, [item_ids, _words(items["title"].combine_chunks())], _ITEM_HEADER)
    counts = _write_users(target, dataset, item_ids)
    return ExportResult(
        dataset.num_users,
        len(items),
        counts.pop("interactions"),
        **counts,
        folder=target.path(""),
        seconds=round(time.monotonic() - started, 3),
    )


def _write_users(target: Workspace, dataset: Dataset, item_ids: pa.Array) -> dict[str, int]:
    """Write the interactions and samples of all users, and count them."""
    newest = max((int(times.max()) for times in _times(dataset) if times.size), default=0)
    counts = Counter({"interactions": 0} | {split.name.lower(): 0 for split in SAMPLE_SPLITS})
    with ExitStack() as stack:
        files = _Files(target, stack)
        for users in dataset.iter_users(batch_users=_BATCH_USERS):
            batch = _Batch.of(users, item_ids, units_per_second(newest))
            files.write_interactions(batch.interactions())
            counts["interactions"] += batch.timestamps.size
            for split in SAMPLE_SPLITS:
                stops = batch.stops(split)
                files.write_samples(split, batch.samples(stops), batch.windows(stops, RECBOLE_ITEMS))
                counts[split.name.lower()] += stops.size
    return dict(counts)


class _Files:
    """The files with a row for each interaction or sample, open until `stack` is closed."""

    def __init__(self, target: Workspace, stack: ExitStack) -> None:
        def parquet(name: str, schema: pa.Schema) -> Any:
            stream = stack.enter_context(target.create(f"{name}.parquet"))
            return stack.enter_context(pq.ParquetWriter(stream, schema, compression="zstd"))

        def recbole(part: str, header: str) -> Any:
            stream = stack.enter_context(target.create(f"recbole/recbole{part}.inter"))
            _write_lines(stream, [], header)
            return stream

        self._samples, self._interactions = parquet("samples", SAMPLES), parquet("interactions", INTERACTIONS)
        self._all = recbole("", _INTERACTION_HEADER)
        self._of_split = {split: recbole(f".{split.name.lower()}", _SAMPLE_HEADER) for split in SAMPLE_SPLITS}

    def write_interactions(self, interactions: pa.Table) -> None:
        """Add interactions (`INTERACTIONS`)."""
        self._interactions.write_table(interactions)
        _write_lines(self._all, [interactions[name] for name in ("user_id", "item_id", "timestamp")])

    def write_samples(self, split: Split, samples: pa.Table, windows: pa.Array) -> None:
        """Add samples (`SAMPLES`) of one split, and their last items for RecBole."""
        self._samples.write_table(samples)
        columns = [samples["user_id"], pc.binary_join(windows, " "), samples["target"], samples["timestamp"]]
        _write_lines(self._of_split[split], columns)


@dataclass(frozen=True)
class _Batch:
    """Histories of some users, with ids in place of indices."""

    user_ids: pa.Array
    user_hashes: IntArray
    offsets: IntArray
    item_ids: pa.Array
    """[H]."""
    timestamps: IntArray
    splits: NDArray[np.int8]
    user_H: IntArray
    position_H: IntArray
    """Positions in the histories, with those that were erased."""
    units: int
    """Units of time in a second."""

    @classmethod
    def of(cls, users: pa.Table, item_ids: pa.Array, units: int) -> "_Batch":
        items, times, splits = (Lists.of(users[name]) for name in ("item_indices", "timestamps", "splits"))
        is_left, offsets = without_erased(items)
        return cls(
            _for_recbole(users["user_id"].combine_chunks(), "user_id"),
            users["user_hash"].to_numpy(),
            offsets,
            item_ids.take(pa.array(items.values[is_left])),
            times.values[is_left],
            splits.values[is_left],
            np.repeat(np.arange(len(users)), np.diff(offsets)),
            items.positions[is_left],
            units,
        )

    def interactions(self) -> pa.Table:
        """Return every interaction (`INTERACTIONS`)."""
        fine = self.units > 1_000_000
        microseconds = self.timestamps // 1_000 if fine else self.timestamps * (1_000_000 // self.units)
        columns = [
            self.user_ids.take(pa.array(self.user_H)),
            self.item_ids,
            pa.array(np.ones(self.timestamps.size, np.float32)),
            pa.array(microseconds, pa.int64()).cast(pa.timestamp("us")),
            pa.array(self.timestamps),
            pa.array(_SPLIT_NAMES[self.splits], pa.string()),
        ]
        return pa.table(columns, schema=INTERACTIONS)

    def stops(self, split: Split) -> IntArray:
        """Return [N] the place of the target of each sample of a split that has a history."""
        places = np.flatnonzero(self.splits == split)
        return places[places > self.offsets[self.user_H[places]]]

    def samples(self, stops: IntArray) -> pa.Table:
        """Return samples (`SAMPLES`)."""
        users = self.user_H[stops]
        positions = self.position_H[stops]
        columns = [
            pa.array(sample_ids(self.user_hashes[users], positions)),
            self.user_ids.take(pa.array(users)),
            pa.array(positions),
            pa.array(_SPLIT_NAMES[self.splits[stops]], pa.string()),
            self.windows(stops),
            self.item_ids.take(pa.array(stops)),
            pa.array(self.timestamps[stops]),
        ]
        return pa.table(columns, schema=SAMPLES)

    def windows(self, stops: IntArray, longest: int | None = None) -> pa.Array:
        """Return [N] the item ids before each place, oldest first: all of them, or the last ones."""
        lengths = stops - self.offsets[self.user_H[stops]]
        if longest is not None:
            lengths = np.minimum(lengths, longest)
        offsets = np.cumsum([0, *lengths])
        places = np.arange(offsets[-1]) + np.repeat(stops - lengths - offsets[:-1], lengths)
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), self.item_ids.take(pa.array(places)))


def _times(dataset: Dataset) -> Iterator[IntArray]:
    return (Lists.of(users["timestamps"]).values for users in dataset.iter_users())


def _for_recbole(ids: pa.Array, name: str) -> pa.Array:
    """Return the same ids. Raises InputError for one that would divide a line of RecBole's files at the wrong place."""
    bad = pc.match_substring_regex(ids, r'[\s"]')
    if pc.any(bad).as_py():
        value = ids.filter(bad)[0].as_py()
        raise InputError(
            f"{name}={value!r}: has white space or a quotation mark, which RecBole's files cannot hold; rename it in"
            " the raw data and run jobs/prepare_data.py again"
        )
    return ids


def _words(titles: pa.Array) -> pa.Array:
    """Return titles as words with single spaces between them, without quotation marks."""
    return pc.utf8_trim_whitespace(pc.replace_substring_regex(titles, r'["\s]+', " "))


def _write_lines(stream: Any, columns: Sequence[pa.Array | pa.ChunkedArray], header: str = "") -> None:
    """Write rows of tab-separated text."""
    texts = [column.cast(pa.string()) for column in columns]
    lines = pc.binary_join_element_wise(*texts, "\t").to_pylist() if texts else []
    stream.write((header + "".join(f"{line}\n" for line in lines)).encode())

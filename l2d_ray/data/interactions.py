"""Raw interactions, reduced to known items and ready to be sorted by user, with counts of the dropped ones."""

from collections.abc import Iterator
from datetime import UTC, date, datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from l2d_ray.config import Config
from l2d_ray.data.catalogue import Catalogue, Rejection
from l2d_ray.data.sources import source_of

_TALLY_HASH = np.iinfo(np.int64).min

READ = pa.schema(
    [
        ("user_id", pa.string()),
        ("user_hash", pa.int64()),
        ("item", pa.int32()),
        ("timestamp", pa.int64()),
        ("file", pa.int32()),
        ("row", pa.int64()),
    ]
)
"""Interactions with candidate indices of items. A row without a user is a *tally*: `item` is a Rejection and `row` the
number of interactions dropped for it. Tallies are part of the data, so that a task that runs twice counts once."""


def user_hashes(user_ids: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
    """Return [N] 64-bit hashes (SipHash with pandas' fixed key), the same on every machine and in every run."""
    strings = np.array(user_ids.to_pylist(), dtype=object)
    return np.asarray(pd.util.hash_array(strings)).view(np.int64)


def read(path: str, file: int, config: Config, catalogue: Catalogue, latest: int | None = None) -> Iterator[pa.Table]:
    """Yield the usable interactions of one file as chunks of READ, and its tallies last.

    Those later than `latest` are not usable. Additional columns, such as d3's `history`, are kept. Raises InputError
    for malformed input.
    """
    rejected = np.zeros(max(Rejection) + 1, dtype=np.int64)
    chunk = None
    for chunk in source_of(config).read_interactions(path, config):
        items = catalogue.find(chunk["item_id"])
        reasons = np.where(items < 0, Rejection.UNKNOWN_ITEM, catalogue.verdicts[items])
        reasons[~in_period(chunk["timestamp"], config.data.since, config.data.until)] = Rejection.OUTSIDE_PERIOD
        if latest is not None:
            reasons[chunk["timestamp"].cast(pa.int64()).to_numpy() > latest] = Rejection.FUTURE
        rejected += np.bincount(reasons, minlength=len(rejected))
        stays = reasons == 0
        chunk = _ready(chunk.filter(pa.array(stays)), items[stays], file)
        yield chunk
    if chunk is not None:
        yield _tallies(rejected, chunk.schema)


def take_tallies(block: pa.Table) -> tuple[pa.Table, dict[int, int]]:
    """Return a block of READ without its tallies, and the sums of the tallies by Rejection."""
    is_tally = block["user_id"].is_null()
    tallies = block.filter(is_tally)
    sums: dict[int, int] = {}
    for reason, count in zip(tallies["item"].to_pylist(), tallies["row"].to_pylist(), strict=True):
        sums[reason] = sums.get(reason, 0) + count
    return block.filter(pc.invert(is_tally)), sums


def in_period(timestamps: pa.ChunkedArray, since: date | None, until: date | None) -> NDArray[np.bool_]:
    """Return [N] whether since <= time < until, at midnight UTC. Whole numbers are Unix seconds."""
    seconds = timestamps if pa.types.is_timestamp(timestamps.type) else timestamps.cast(pa.timestamp("s"))
    inside = np.ones(len(timestamps), dtype=np.bool_)
    for day, compare in ((since, pc.greater_equal), (until, pc.less)):
        if day is not None:
            midnight = pa.scalar(datetime(day.year, day.month, day.day, tzinfo=UTC).replace(tzinfo=None))
            midnight = midnight.cast(pa.timestamp(seconds.type.unit))
            inside &= compare(seconds.cast(midnight.type), midnight).to_numpy()
    return inside


def _ready(chunk: pa.Table, items: NDArray[np.int32], file: int) -> pa.Table:
    timestamps = chunk["timestamp"]
    ready = pa.table(
        {
            "user_id": chunk["user_id"],
            "user_hash": user_hashes(chunk["user_id"]),
            "item": items,
            "timestamp": timestamps.cast(pa.int64()),
            "file": np.full(len(chunk), file, dtype=np.int32),
            "row": chunk["row"],
        },
        schema=READ,
    )
    for name in chunk.column_names[4:]:
        ready = ready.append_column(name, chunk[name])
    return ready


def _tallies(rejected: NDArray[np.int64], schema: pa.Schema) -> pa.Table:
    reasons = np.flatnonzero(rejected[1:]) + 1
    columns = {
        "user_id": pa.nulls(len(reasons), pa.string()),
        "user_hash": np.full(len(reasons), _TALLY_HASH),
        "item": reasons.astype(np.int32),
        "timestamp": np.zeros(len(reasons), dtype=np.int64),
        "file": np.zeros(len(reasons), dtype=np.int32),
        "row": rejected[reasons],
    }
    extra = {field.name: pa.nulls(len(reasons), field.type) for field in schema if field.name not in columns}
    return pa.table(columns | extra, schema=schema)

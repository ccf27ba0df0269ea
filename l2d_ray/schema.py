"""Column names and Arrow schemas that the stages share.

A *sample* is (user, position): the items of a user's history before `position`, and the item at `position` that came
next. A history is one row, because the prompts of a user's samples share tokens.
"""

from enum import IntEnum

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


class Split(IntEnum):
    """The split of the sample at a position of a history. Splits never decrease along a history, but for NONE."""

    NONE = 0
    """No sample: the first position has no history. In a file that a dataset grew by, also what earlier files have. So
    has an interaction that was erased."""
    TRAIN = 1
    VALID = 2
    TEST = 3


ERASED_ITEM = int(np.iinfo(np.int32).min)
"""Stands in item_indices for the item of an interaction that was erased, so that the places of the others stay."""

ITEMS = pa.schema([("item_index", pa.int32()), ("item_id", pa.string()), ("title", pa.string())])
"""`dataset/items.parquet`: item_index counts from 0 and equals the row number. `dataset/items/<n>/*.parquet` go on."""

HISTORIES = pa.schema(
    [
        ("user_id", pa.string()),
        ("user_hash", pa.int64()),
        ("item_indices", pa.list_(pa.int32())),
        ("timestamps", pa.list_(pa.int64())),
        ("splits", pa.list_(pa.int8())),
    ]
)
"""`dataset/histories/*.parquet`: one row per user. Items are in time order, equal times in the input's row order.
`dataset/histories/<n>/*.parquet` of a dataset that grew: the whole history of each user with new interactions."""

SAMPLES = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("user_hash", pa.int64()),
        ("item_index", pa.int32()),
        ("timestamp", pa.int64()),
    ]
)
"""Columns of a sample in the memory. item_index and timestamp belong to the item that came next."""

QUARANTINE = SAMPLES.append(pa.field("reason", pa.string()))
"""`memory/quarantine/<unit>/*.parquet`: samples without a row."""

DELETIONS = pa.schema([("shard", pa.int32()), ("rows", pa.list_(pa.int64()))])
"""`memory/deletions/<unit>/*.parquet`: row numbers in the file of a shard; null stands for the quarantine."""


def memory_schema(dimension: int) -> pa.Schema:
    """Return the schema of `memory/data/<unit>/shard=<k>/*.parquet`: samples and hidden states.

    A state is `dimension` float16 numbers as bytes; the field's metadata names dtype and dimension. A binary column is
    written 10 times and read 8 times faster than a list of halffloat.
    """
    metadata = {"dtype": "float16", "dim": str(dimension)}
    return SAMPLES.append(pa.field("hidden_state", pa.binary(2 * dimension), nullable=False, metadata=metadata))


def hidden_states(rows: pa.RecordBatch | pa.Table) -> NDArray[np.float16]:
    """Return the hidden states [N, D] of rows read from a memory."""
    if isinstance(rows, pa.Table):
        rows = rows.combine_chunks().to_batches()[0] if rows.num_rows else pa.RecordBatch.from_pylist([], rows.schema)
    column = rows.column("hidden_state")
    width = column.type.byte_width // 2
    values = np.frombuffer(column.buffers()[1] or b"", np.float16).reshape(-1, width)
    return values[column.offset : column.offset + len(column)]

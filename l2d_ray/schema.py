"""Column names and Arrow schemas that the stages share.

A *sample* is (user, position): the items of a user's history before `position`, and the item at `position` that came
next. Histories are kept whole, one row a user, because the prompts of one user's samples share their tokens.
"""

from enum import IntEnum

import pyarrow as pa


class Split(IntEnum):
    """What the sample at a position of a history is for. A user's splits never decrease along the history."""

    NONE = 0
    """No sample: there is nothing before the first item."""
    TRAIN = 1
    VALID = 2
    TEST = 3


ITEMS = pa.schema([("item_index", pa.int32()), ("item_id", pa.string()), ("title", pa.string())])
"""`dataset/items.parquet`: item_index is dense, from 0, and the row number."""

HISTORIES = pa.schema(
    [
        ("user_id", pa.string()),
        ("user_hash", pa.int64()),
        ("item_indices", pa.list_(pa.int32())),
        ("timestamps", pa.list_(pa.int64())),
        ("splits", pa.list_(pa.int8())),
    ]
)
"""`dataset/histories/*.parquet`: one row a user, in time order; row order in the input breaks ties of time."""

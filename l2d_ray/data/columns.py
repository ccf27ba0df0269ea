"""Checks of raw columns: each returns a clean Arrow array or raises InputError with file, row and value.

`first_row` is the number, from 1, of a chunk's first row in its file.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from l2d_ray.core.arrays import Float64
from l2d_ray.errors import InputError

INTERACTIONS = pa.schema(
    [("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64()), ("row", pa.int64())]
)
"""Schema of the interactions that every source yields. `timestamp` may also be an Arrow timestamp, of a known unit.
`data.since` and `data.until` take whole numbers for Unix seconds. `row` orders equal timestamps."""

ITEMS = pa.schema([("item_id", pa.string()), ("title", pa.string())])
"""Schema of the items that every source yields; a missing title is empty."""

EXACT = 2.0**53
"""Largest whole number up to which every whole number is a floating-point number."""
_WHOLE = "give whole numbers, such as Unix seconds, or an Arrow timestamp column"


def require(path: str, wanted: Sequence[str], found: Sequence[str], remedy: str) -> None:
    """Raise InputError unless each wanted column is there exactly once."""
    for name in wanted:
        if list(found).count(name) != 1:
            problem = "more than one column" if name in found else "no column"
            raise InputError(f"{path}: {problem} {name!r} among {', '.join(map(repr, found))}; {remedy}")


def interactions(user: Any, item: Any, timestamp: Any, first_row: int) -> pa.Table:
    """Return interactions (`INTERACTIONS`) from three checked columns."""
    rows = pa.array(np.arange(first_row, first_row + len(timestamp), dtype=np.int64))
    return pa.table([user, item, timestamp, rows], names=INTERACTIONS.names)


def items(item_ids: pa.Array, titles: pa.Array) -> pa.Table:
    """Return items (`ITEMS`) from two checked columns."""
    return pa.table([item_ids, titles], schema=ITEMS)


def ids(column: Any, path: str, name: str, first_row: int) -> pa.Array:
    """Return the column as strings. Raises InputError for anything but whole numbers and text that is not empty."""
    array = _one_array(column, path, name, first_row, (str, int))
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if not (_is_text(array.type) or pa.types.is_integer(array.type) or pa.types.is_null(array.type)):
        raise InputError(f"{path}: column {name!r} is of type {array.type}; give text or whole numbers as ids")
    text = _valid(array.cast(pa.string()), path, name)
    bad = pc.fill_null(pc.equal(text, ""), True)
    if pc.any(bad).as_py():
        raise InputError(f"{path}: row {_first(bad, first_row)}: {name} is empty; fill it in or remove the row")
    return text


def titles(column: Any, path: str, name: str, first_row: int) -> pa.Array:
    """Return the column as strings, with null as the empty title."""
    array = _one_array(column, path, name, first_row, (str,))
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if not (_is_text(array.type) or pa.types.is_null(array.type)):
        raise InputError(f"{path}: column {name!r} is of type {array.type}; give text as titles")
    return pc.fill_null(_valid(array.cast(pa.string()), path, name), "")


def whole_numbers(column: Any, path: str, name: str, first_row: int, parse: bool = False) -> pa.Array:
    """Return the column as int64, or as an Arrow timestamp in microseconds if it holds dates or times.

    Floating-point numbers must be finite and whole. Text is accepted with `parse` only, for formats of text.
    """
    array = _one_array(column, path, name, first_row, (int, float))
    if pc.any(array.is_null()).as_py():
        raise InputError(
            f"{path}: row {_first(array.is_null(), first_row)}: {name} is null; fill it in or remove the row"
        )
    if pa.types.is_temporal(array.type) and not (pa.types.is_time(array.type) or pa.types.is_duration(array.type)):
        return array.cast(pa.timestamp("us"), safe=False)
    if parse and _is_text(array.type):
        array = _parsed(array, path, name, first_row)
    if pa.types.is_floating(array.type):
        return _from_floats(array, path, name, first_row)
    if not pa.types.is_integer(array.type):
        value = array[0].as_py() if len(array) else None
        raise InputError(f"{path}: row {first_row}: {name}={value!r} is of type {array.type}; {_WHOLE}")
    try:
        return array.cast(pa.int64())
    except pa.ArrowInvalid:
        raise InputError(f"{path}: {name} has values beyond 64 bits; {_WHOLE}") from None


def finite_numbers(column: Any, path: str, name: str, first_row: int) -> Float64:
    """Return the column, of numbers or of text that holds numbers, as float64. Raises InputError for nulls and NaN."""
    array = _one_array(column, path, name, first_row, (int, float))
    try:
        values = array.cast(pa.float64()).to_numpy(zero_copy_only=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        values = np.array([value if _is_number(value) else np.nan for value in array.to_pylist()], np.float64)
    bad = ~np.isfinite(values)
    if bad.any():
        row = int(np.argmax(bad))
        value = array[row].as_py()
        raise InputError(f"{path}: row {first_row + row}: {name}={value!r} is no finite number; correct the row")
    return np.asarray(values, np.float64)


def _parsed(array: pa.Array, path: str, name: str, first_row: int) -> pa.Array:
    try:
        return array.cast(pa.int64())
    except pa.ArrowInvalid:
        pass
    try:
        return array.cast(pa.float64())
    except pa.ArrowInvalid:
        for row, value in enumerate(array.to_pylist(), start=first_row):
            if not _is_number(value):
                raise InputError(f"{path}: row {row}: {name}={value!r} is not a whole number; {_WHOLE}") from None
        raise


def _from_floats(array: pa.Array, path: str, name: str, first_row: int) -> pa.Array:
    values = array.cast(pa.float64()).to_numpy(zero_copy_only=False)
    with np.errstate(invalid="ignore"):
        bad = ~(np.isfinite(values) & (values == np.trunc(values)))
        inexact = np.abs(values) > EXACT
    for wrong, what in ((bad, "not a whole number"), (inexact, "too large for a floating-point number to be exact")):
        if wrong.any():
            row = int(np.argmax(wrong))
            raise InputError(f"{path}: row {first_row + row}: {name}={values[row]} is {what}; {_WHOLE}")
    return pa.array(values.astype(np.int64))


def _one_array(column: Any, path: str, name: str, first_row: int, accepted: tuple[type, ...]) -> pa.Array:
    """Return the Arrow array of a column or of a list of Python values of one type."""
    if isinstance(column, pa.ChunkedArray):
        return column.combine_chunks()
    if isinstance(column, pa.Array):
        return column
    try:
        return pa.array(column)
    except UnicodeEncodeError as error:  # JSON may hold a lone surrogate
        row, value = first_row + column.index(error.object), error.object
        raise InputError(f"{path}: row {row}: {name}={value!r} has half a character; correct the row") from None
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        for row, value in enumerate(column, start=first_row):
            if value is not None and (isinstance(value, bool) or not isinstance(value, accepted)):
                expected = " or ".join(t.__name__ for t in accepted)
                raise InputError(f"{path}: row {row}: {name}={value!r}: expected {expected}; correct the row") from None
        if str in accepted and int in accepted:
            return pa.array([value if value is None else str(value) for value in column], type=pa.string())
        raise InputError(
            f"{path}: row {first_row} or later: {name} mixes types or has values beyond 64 bits; correct the rows"
        ) from None


def _valid(text: pa.Array, path: str, name: str) -> pa.Array:
    """Return the same array if it is valid UTF-8, which Parquet does not ensure."""
    try:
        text.validate(full=True)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: {name}: not UTF-8 ({error}); write the file again from decoded text") from None
    return text


def _is_number(text: Any) -> bool:
    try:
        float(text)
    except (ValueError, TypeError):
        return False
    return True


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _first(bad: pa.Array, first_row: int) -> int:
    return first_row + int(np.argmax(bad.to_numpy(zero_copy_only=False)))

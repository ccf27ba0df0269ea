"""Delimited text (CSV, TSV and the like), streamed by pyarrow with every column as text.

A column's type must not depend on its first rows, so `columns` checks and converts the text.
"""

from collections.abc import Iterator, Sequence

import pyarrow as pa
from pyarrow import csv

from l2d_ray.data.columns import require
from l2d_ray.data.files import readable
from l2d_ray.errors import InputError

_BLOCK_BYTES = 16 << 20


def read_delimited(
    path: str,
    wanted: Sequence[str],
    *,
    delimiter: str = ",",
    names: Sequence[str] | None = None,
    quoted: bool = True,
    remedy: str,
) -> Iterator[tuple[int, pa.Table]]:
    """Yield the wanted columns, some rows at a time, with the number of the first row, from 1 after the header.

    `names` are the columns of a file without a header. Raises InputError for a missing column (with `remedy`), for a
    file without rows, for text that is not UTF-8, and for rows of another width.
    """
    parse = csv.ParseOptions(delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted)
    read = csv.ReadOptions(block_size=_BLOCK_BYTES, column_names=names)
    if names is None:
        names = header(path, parse)
    require(path, wanted, names, remedy)
    # Without a type, pyarrow would guess those of the unwanted columns, too, and fail on some of them.
    convert = csv.ConvertOptions(include_columns=list(wanted), column_types=dict.fromkeys(names, pa.string()))
    row = 1
    try:
        with readable(path) as stream:
            for batch in csv.open_csv(stream, read, parse, convert):
                yield row, pa.Table.from_batches([batch])
                row += batch.num_rows
    except pa.ArrowInvalid as error:
        raise InputError(_explain(path, str(error), row)) from None
    if row == 1:
        raise InputError(f"{path}: no rows below the header; give the complete file, or remove it from the folder")


def header(path: str, parse: csv.ParseOptions) -> list[str]:
    """Return the names in the first line. Raises InputError if it is not readable."""
    read = csv.ReadOptions(block_size=_BLOCK_BYTES)
    try:
        with readable(path) as stream:
            names: list[str] = csv.open_csv(stream, read, parse).schema.names
            return names
    except pa.ArrowInvalid as error:
        raise InputError(_explain(path, str(error), 1)) from None


def _explain(path: str, message: str, row: int) -> str:
    if "UTF8" in message:
        return f"{path}: row {row} or later: {message}; convert the file (iconv -f latin1 -t utf-8)"
    return f"{path}: row {row} or later: {message}; correct the row"

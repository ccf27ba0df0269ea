"""Tables of any origin: Parquet, CSV, TSV or JSON lines, one file or a folder, with the columns of `data.columns`.

The suffix tells the format; `.gz` may follow all but Parquet. Times are whole numbers of any unit, or Arrow timestamps,
which become microseconds.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from l2d_ray.config import Config
from l2d_ray.data import columns
from l2d_ray.data.delimited import header, read_delimited
from l2d_ray.data.files import CHUNK_ROWS, children, json_chunks, seekable, suffix
from l2d_ray.errors import InputError, one_line

NEEDS = ("interactions", "items")
_REMEDY = "name the columns with data.columns.user, data.columns.item and data.columns.timestamp"
_ITEMS_REMEDY = "name the columns of the items with data.columns.id_in_items and data.columns.title"


def read_items(config: Config) -> Iterator[pa.Table]:
    """Yield all items, in the order of the sorted files and their rows."""
    names = config.data.columns
    item, title = names.id_in_items or names.item, names.title
    for path in children("data.items", str(config.data.items)):
        for row, chunk in read_chunks(path, (item, title), _ITEMS_REMEDY):
            item_ids = columns.ids(chunk[item], path, item, row)
            yield columns.items(item_ids, columns.titles(chunk[title], path, title, row))


def interaction_files(config: Config) -> list[str]:
    """Return the file, or the sorted files of the folder."""
    return children("data.interactions", str(config.data.interactions))


def read_interactions(path: str, config: Config) -> Iterator[pa.Table]:
    """Yield the rows of one file."""
    names = config.data.columns
    is_text = suffix(path) in _DELIMITERS
    for row, chunk in read_chunks(path, (names.user, names.item, names.timestamp), _REMEDY):
        yield columns.interactions(
            columns.ids(chunk[names.user], path, names.user, row),
            columns.ids(chunk[names.item], path, names.item, row),
            columns.whole_numbers(chunk[names.timestamp], path, names.timestamp, row, parse=is_text),
            row,
        )


_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".json", ".ndjson")


def read_chunks(path: str, wanted: Sequence[str], remedy: str) -> Iterator[tuple[int, Any]]:
    """Yield the wanted columns by name, some rows at a time, with the number of the first row, from 1."""
    kind = suffix(path)
    if kind in _DELIMITERS:
        return read_delimited(path, wanted, delimiter=_DELIMITERS[kind], remedy=remedy)
    if kind in _JSON_LINES:
        return _json_chunks(path, wanted, remedy)
    if kind == ".parquet":
        return _parquet_chunks(path, wanted, remedy)
    raise _unknown(path)


def column_names(path: str) -> list[str]:
    """Return the names of the columns of a file; of JSON Lines, the keys of the first object."""
    kind = suffix(path)
    if kind in _DELIMITERS:
        return header(path, csv.ParseOptions(delimiter=_DELIMITERS[kind]))
    if kind in _JSON_LINES:
        return [name for _, chunk in islice(json_chunks(path), 1) for name in chunk[0][1]]
    if kind == ".parquet":
        with _parquet(path) as file:
            names: list[str] = file.schema_arrow.names
            return names
    raise _unknown(path)


def _unknown(path: str) -> InputError:
    known = ", ".join([".parquet", *_DELIMITERS, *_JSON_LINES])
    return InputError(f"{path}: unknown suffix {suffix(path)!r}; rename or convert the file to one of {known}")


@contextmanager
def _parquet(path: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file. Raises InputError, also while it is read, if it is damaged."""
    try:
        with seekable(path) as stream:
            yield pq.ParquetFile(stream)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: damaged Parquet file ({one_line(error)}); write it again") from None


def _parquet_chunks(path: str, wanted: Sequence[str], remedy: str) -> Iterator[tuple[int, pa.Table]]:
    row = 1
    with _parquet(path) as file:
        columns.require(path, wanted, file.schema_arrow.names, remedy)
        for batch in file.iter_batches(CHUNK_ROWS, columns=list(dict.fromkeys(wanted))):
            yield row, pa.Table.from_batches([batch])
            row += batch.num_rows
    if row == 1:
        raise InputError(f"{path}: no rows; give the complete file, or remove it from the folder")


def _json_chunks(path: str, wanted: Sequence[str], remedy: str) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    for row, chunk in json_chunks(path):
        if row == 1:  # a key may be missing in some objects
            columns.require(path, wanted, list(dict.fromkeys(key for _, record in chunk for key in record)), remedy)
        yield row, {name: [record.get(name) for _, record in chunk] for name in wanted}

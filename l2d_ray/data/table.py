"""Any table: Parquet, CSV, TSV or JSON lines, one file or a folder of them, with the columns that `data.columns` names.

The format is the suffix (`.gz` may follow all but Parquet). Times are whole numbers of any unit, or Arrow timestamps,
which become microseconds.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from l2d_ray.config import Config
from l2d_ray.data import columns
from l2d_ray.data.delimited import read_delimited
from l2d_ray.data.files import CHUNK_ROWS, children, json_chunks, seekable, suffix
from l2d_ray.errors import InputError, one_line

_REMEDY = "name the columns with data.columns.user, data.columns.item and data.columns.timestamp"
_ITEMS_REMEDY = "name the columns of the items with data.columns.id_in_items and data.columns.title"


def read_items(config: Config) -> pa.Table:
    """All items, in the order of the sorted files and their rows."""
    return columns.items(item_chunks(config))


def item_chunks(config: Config) -> Iterator[tuple[pa.Array, pa.Array]]:
    """Yield ids and titles of the items, chunk by chunk."""
    names = config.data.columns
    item, title = names.id_in_items or names.item, names.title
    for path in children("data.items", str(config.data.items)):
        for row, chunk in _chunks(path, (item, title), _ITEMS_REMEDY):
            yield columns.ids(chunk[item], path, item, row), columns.titles(chunk[title], path, title, row)


def interaction_files(config: Config) -> list[str]:
    """The file, or the sorted files of the folder."""
    return children("data.interactions", str(config.data.interactions))


def read_interactions(path: str, config: Config) -> Iterator[pa.Table]:
    """The rows in the order of the file."""
    names = config.data.columns
    is_text = suffix(path) in _DELIMITERS
    for row, chunk in _chunks(path, (names.user, names.item, names.timestamp), _REMEDY):
        yield columns.interactions(
            columns.ids(chunk[names.user], path, names.user, row),
            columns.ids(chunk[names.item], path, names.item, row),
            columns.whole_numbers(chunk[names.timestamp], path, names.timestamp, row, parse=is_text),
            row,
        )


_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".json", ".ndjson")


def _chunks(path: str, wanted: Sequence[str], remedy: str) -> Iterator[tuple[int, Any]]:
    """Chunks as something that maps a column's name to its values, each with the number of its first row from 1."""
    kind = suffix(path)
    if kind in _DELIMITERS:
        return read_delimited(path, wanted, delimiter=_DELIMITERS[kind], remedy=remedy)
    if kind in _JSON_LINES:
        return _json_chunks(path, wanted, remedy)
    if kind == ".parquet":
        return _parquet_chunks(path, wanted, remedy)
    known = ", ".join([".parquet", *_DELIMITERS, *_JSON_LINES])
    raise InputError(f"{path}: the suffix {kind!r} is none of {known}; rename or convert the file")


def _parquet_chunks(path: str, wanted: Sequence[str], remedy: str) -> Iterator[tuple[int, pa.Table]]:
    row = 1
    try:
        with seekable(path) as stream:
            file = pq.ParquetFile(stream)
            columns.require(path, wanted, file.schema_arrow.names, remedy)
            for batch in file.iter_batches(CHUNK_ROWS, columns=list(dict.fromkeys(wanted))):
                yield row, pa.Table.from_batches([batch])
                row += batch.num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: {one_line(error)}; the Parquet file is damaged, write it again") from None
    if row == 1:
        raise InputError(f"{path}: no rows; give the complete file, or take it out of the folder")


def _json_chunks(path: str, wanted: Sequence[str], remedy: str) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    for row, chunk in json_chunks(path):
        columns.require(path, wanted, list(chunk[0][1]), remedy)
        yield row, {name: [record.get(name) for _, record in chunk] for name in wanted}

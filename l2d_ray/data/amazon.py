"""Amazon reviews as JSON lines, gzipped or not, in the editions of 2014, 2018 and 2023.

The keys tell the edition: `reviewerID` and `asin` in 2014 and 2018, `user_id` and `parent_asin` in 2023. The metadata
of 2014 are Python literals, one dict a line. Titles are cleaned as in D3 (arXiv 2406.14900): HTML entities are decoded,
outer spaces and quotes removed, and a title with page source in it ("<span id") counts as missing.
"""

import ast
import html
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import pyarrow as pa

from l2d_ray.config import Config
from l2d_ray.data import columns
from l2d_ray.data.files import CHUNK_ROWS, children, json_chunks, numbered_lines
from l2d_ray.errors import InputError

NEEDS = ("interactions", "items")
_EDITIONS = (("reviewerID", "asin", "unixReviewTime"), ("user_id", "parent_asin", "timestamp"))


def read_items(config: Config) -> Iterator[pa.Table]:
    """Yield all items of the metadata. The first line of an id counts; the edition of 2018 repeats some."""
    seen: set[str] = set()
    for path in children("data.items", str(config.data.items)):
        records = _metadata(path)
        while chunk := list(islice(records, CHUNK_ROWS)):
            titles: dict[str, str] = {}
            for line, record in chunk:
                item_id = _item_id(path, line, record)
                if item_id not in seen:
                    titles.setdefault(item_id, _clean(record.get("title")))
            seen.update(titles)
            yield columns.items(pa.array(titles.keys(), pa.string()), pa.array(titles.values(), pa.string()))


def interaction_files(config: Config) -> list[str]:
    """Return the review file, or all files of its folder."""
    return children("data.interactions", str(config.data.interactions))


def read_interactions(path: str, _config: Config) -> Iterator[pa.Table]:
    """Yield the reviews, with times in Unix seconds (2014, 2018) or milliseconds (2023)."""
    for row, chunk in json_chunks(path):
        user, item, time = keys = _edition(path, chunk[0])
        values = zip(*(_values(path, line, record, keys) for line, record in chunk), strict=True)
        users, items, times = (list(column) for column in values)
        moments = columns.whole_numbers(times, path, time, row)
        if time == "timestamp":
            moments = moments.cast(pa.timestamp("ms"))
        yield columns.interactions(
            columns.ids(users, path, user, row), columns.ids(items, path, item, row), moments, row
        )


def _metadata(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in numbered_lines(path):
        record = _literal(line)
        if not isinstance(record, dict):
            raise InputError(f"{path}: line {number}: neither JSON nor a Python dict; give the metadata file (meta_…)")
        yield number, record


def _item_id(path: str, line: int, record: dict[str, Any]) -> str:
    item_id = record.get("parent_asin") or record.get("asin")
    if not isinstance(item_id, str):
        raise InputError(f"{path}: line {line}: neither parent_asin nor asin; give the metadata file (meta_…)")
    if not item_id.isprintable():
        raise InputError(f"{path}: line {line}: asin={item_id!r} is not printable; correct the line")
    return item_id


def _literal(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(line.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def _clean(title: Any) -> str:
    if not isinstance(title, str) or "<span id" in title:
        return ""
    whole = title.encode(errors="ignore").decode()  # without the lone surrogates that JSON may hold
    return html.unescape(whole).strip(" ").strip('"')


def _edition(path: str, first: tuple[int, dict[str, Any]]) -> tuple[str, str, str]:
    line, record = first
    for keys in _EDITIONS:
        if keys[0] in record:
            return keys
    wanted = " nor ".join(", ".join(keys) for keys in _EDITIONS)
    raise InputError(f"{path}: line {line}: neither {wanted}; give the reviews file as published")


def _values(path: str, line: int, record: dict[str, Any], keys: Iterable[str]) -> list[Any]:
    try:
        return [record[key] for key in keys]
    except KeyError as error:
        raise InputError(f"{path}: line {line}: no key {error}; complete the row or remove it") from None

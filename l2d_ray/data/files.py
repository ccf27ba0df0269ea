"""Raw files in a folder, a file or a URI (`l2d_ray.storage`), gzipped or not, read as streams.

Paths are strings that any worker can open: absolute paths or URIs.
"""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from l2d_ray.errors import InputError
from l2d_ray.storage import open_storage

CHUNK_ROWS = 200_000
"""Rows that are read at a time."""


def children(key: str, value: str) -> list[str]:
    """Return the file `value` or, if it is a folder, the files directly in it, sorted and without hidden ones.

    Raises InputError, which names the configuration's `key`, if nothing is there.
    """
    filesystem, path = _locate(value)
    kind = filesystem.get_file_info(path).type
    if kind == pafs.FileType.NotFound:
        raise InputError(f"{key}={value!r}: not found; give a file, a folder or a URI that exists")
    if kind == pafs.FileType.File:
        return [value if "://" in value else path]
    found = filesystem.get_file_info(pafs.FileSelector(path))
    names = sorted(info.base_name for info in found if info.type == pafs.FileType.File)
    return [join(value if "://" in value else path, name) for name in names if name[0] not in "._"]


def join(folder: str, name: str) -> str:
    """Return the path of `name` in `folder`. The query of a URI (s3://…?region=…) stays at its end."""
    stem, mark, query = folder.partition("?") if "://" in folder else (folder, "", "")
    return f"{stem.rstrip('/')}/{name}{mark}{query}"


def folder_of(path: str) -> str:
    """Return the folder of a file, as a path or URI that `children` takes."""
    stem, mark, query = path.partition("?") if "://" in path else (path, "", "")
    return f"{stem.rpartition('/')[0] or '/'}{mark}{query}"


def file_name(path: str) -> str:
    """Return the last part of a path or URI."""
    stem = path.partition("?")[0] if "://" in path else path
    return stem.rstrip("/").rpartition("/")[2]


def suffix(path: str) -> str:
    """Return the lower-case suffix before any `.gz`: `.csv` for ratings.CSV.gz."""
    return Path(file_name(path).lower().removesuffix(".gz")).suffix


def size(path: str) -> int:
    """Return the size of the file in bytes, as it is stored."""
    filesystem, local = _locate(path)
    info = filesystem.get_file_info(local)
    if info.type == pafs.FileType.NotFound:
        raise InputError(f"{path}: not found on this machine; put it where every node can read it")
    return int(info.size or 0)


@contextmanager
def readable(path: str) -> Iterator[pa.NativeFile]:
    """Yield a stream of the file's bytes, decompressed if its name ends in .gz.

    Raises InputError if the file is empty, and during reading if it is not gzip or truncated.
    """
    filesystem, local = _filled(path)
    try:
        with filesystem.open_input_stream(local, compression="detect") as stream:
            yield stream
    except OSError as error:
        if "zlib" not in str(error) and "ompressed" not in str(error):
            raise
        raise InputError(f"{path}: damaged gzip file ({error}); get it again") from None


@contextmanager
def seekable(path: str) -> Iterator[pa.NativeFile]:
    """Yield a file for formats that are read by offset (Parquet), which is never decompressed."""
    filesystem, local = _filled(path)
    with filesystem.open_input_file(local) as file:
        yield file


def numbered_lines(path: str, fallback: str | None = None) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, with their numbers from 1.

    The encoding is UTF-8, or `fallback` for a line that is not UTF-8. Raises InputError for an empty file, and for a
    line that neither encoding reads.
    """
    seen = False
    with readable(path) as stream:
        for number, line in enumerate(io.BufferedReader(stream, 1 << 20), start=1):
            text = _decode(line, fallback, f"{path}: line {number}").rstrip("\r\n")
            if number == 1:
                text = text.removeprefix("\ufeff")  # the mark with which some editors begin a file
            if text.strip():
                seen = True
                yield number, text
    if not seen:
        raise _empty(path)


def json_chunks(path: str) -> Iterator[tuple[int, list[tuple[int, dict[str, Any]]]]]:
    """Yield the objects of a JSON-lines file with their line numbers, some at a time, with the number of the first.

    Raises InputError for a line that is no JSON object.
    """
    records, row = _json_objects(path), 1
    while chunk := list(islice(records, CHUNK_ROWS)):
        yield row, chunk
        row += len(chunk)


def _json_objects(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in numbered_lines(path):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: line {number}: not JSON ({error}); give one JSON object a line") from None
        if not isinstance(value, dict):
            raise InputError(f"{path}: line {number}: {line[:40]!r} is not a JSON object; give one a line")
        yield number, value


def _decode(line: bytes, fallback: str | None, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        if fallback is not None:
            return line.decode(fallback)
        bad = line[error.start : error.start + 1]
        raise InputError(f"{where}: byte {bad!r} is not UTF-8; convert the file (iconv -f latin1 -t utf-8)") from None


def _filled(path: str) -> tuple[pafs.FileSystem, str]:
    if size(path) == 0:
        raise _empty(path)
    return _locate(path)


def _empty(path: str) -> InputError:
    return InputError(f"{path}: the file is empty; give the complete file, or remove it from the folder")


def _locate(path: str) -> tuple[pafs.FileSystem, str]:
    storage = open_storage(path)
    return storage.filesystem, storage.root

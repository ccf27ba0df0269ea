"""The workspace: one folder, on a disk or an object store, that holds everything the stages leave behind."""

import hashlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from l2d_ray.errors import InputError


@dataclass(frozen=True)
class Workspace:
    """Files below one root, addressed by relative paths with forward slashes.

    `uri` is a folder or whatever URI `pyarrow.fs` opens (s3://…, gs://…, file://…).
    """

    uri: str
    filesystem: pafs.FileSystem
    root: str

    @classmethod
    def open(cls, uri: str) -> "Workspace":
        """The workspace at `uri`; nothing is created. Raises InputError for a URI no filesystem answers to."""
        if "://" not in uri:
            path = Path(uri).expanduser().resolve()
            return cls(str(path), pafs.LocalFileSystem(), str(path))
        try:
            filesystem, root = pafs.FileSystem.from_uri(uri)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"workspace={uri!r}: {error}; give a folder or a URI that pyarrow.fs opens") from None
        return cls(uri, filesystem, root.rstrip("/"))

    def path(self, relative: str) -> str:
        """The filesystem's own path of `relative`."""
        return f"{self.root}/{relative}" if relative else self.root

    def exists(self, relative: str) -> bool:
        """Whether a file or folder is there."""
        return bool(self.filesystem.get_file_info(self.path(relative)).type != pafs.FileType.NotFound)

    def files(self, folder: str, suffix: str = "") -> list[str]:
        """Relative paths of all files below `folder`, sorted; none if there is no such folder."""
        found = self.filesystem.get_file_info(
            pafs.FileSelector(self.path(folder), recursive=True, allow_not_found=True)
        )
        paths = [info.path for info in found if info.type == pafs.FileType.File and info.path.endswith(suffix)]
        return sorted(path[len(self.root) + 1 :] for path in paths)

    def copy(self, folder: str, to: "Workspace", target: str) -> None:
        """Copy what is below `folder` to below `target` of a workspace, every file as by `create`."""
        for path in self.files(folder):
            name = path.removeprefix(f"{folder}/")
            with self.filesystem.open_input_stream(self.path(path)) as source, to.create(f"{target}/{name}") as stream:
                shutil.copyfileobj(source, stream)

    def delete(self, relative: str) -> None:
        """Remove one file or folder; it may be gone already."""
        info = self.filesystem.get_file_info(self.path(relative))
        if info.type == pafs.FileType.Directory:
            self.filesystem.delete_dir(info.path)
        elif info.type == pafs.FileType.File:
            self.filesystem.delete_file(info.path)

    @contextmanager
    def create(self, relative: str, exclusive: bool = False) -> Iterator[pa.NativeFile]:
        """A stream whose content appears at `relative` when the block ends.

        On a disk: a temporary file beside it, synced and renamed, so that it appears whole or not at all. An object
        store shows an object when its upload ends, but a block that raises may leave a part of it: so nothing may name
        a file before it is complete. `exclusive` raises FileExistsError, on a disk even in a race, and replaces no
        file. Raises OSError (no space left, read-only, …) with the path in it.
        """
        path = self.path(relative)
        local = isinstance(self.filesystem, pafs.LocalFileSystem)
        target = f"{path}.{uuid.uuid4().hex[:8]}.tmp" if local else path
        try:
            self.filesystem.create_dir(path.rpartition("/")[0], recursive=True)
            with self.filesystem.open_output_stream(target) as stream:
                yield stream
            if local:
                _publish(Path(target), Path(path), exclusive)
        except BaseException as error:
            if local:
                Path(target).unlink(missing_ok=True)
            if isinstance(error, OSError) and path not in str(error):
                raise OSError(f"{error} (writing {path})") from error
            raise

    def write_json(self, relative: str, value: dict[str, Any], exclusive: bool = False) -> None:
        """Write one JSON object, atomically; `exclusive` as in `create`."""
        if exclusive and self.exists(relative):
            raise FileExistsError(f"{self.path(relative)}: exists")
        with self.create(relative, exclusive) as stream:
            stream.write((json.dumps(value, indent=1) + "\n").encode())

    def read_json(self, relative: str) -> dict[str, Any]:
        """Read one JSON object. Raises InputError if it is not there or not JSON."""
        try:
            with self.filesystem.open_input_stream(self.path(relative)) as stream:
                value = json.loads(stream.read())
        except FileNotFoundError:
            raise InputError(f"{self.path(relative)}: not found; run the stage that writes it first") from None
        except ValueError as error:
            raise InputError(f"{self.path(relative)}: not JSON ({error}); the file is damaged") from None
        if not isinstance(value, dict):
            raise InputError(f"{self.path(relative)}: expected a JSON object; the file is damaged")
        return value


class DigestingSink(io.RawIOBase):
    """A file that hashes and counts what passes through it."""

    def __init__(self, stream: pa.NativeFile) -> None:
        self._stream, self._digest, self.count = stream, hashlib.sha256(), 0

    @property
    def sha256(self) -> str:
        """The checksum of what was written so far."""
        return self._digest.hexdigest()

    def write(self, data: Any) -> int:
        """As of any binary file; takes whatever has a buffer."""
        self._stream.write(data)
        self._digest.update(data)
        size = memoryview(data).nbytes
        self.count += size
        return size

    def writable(self) -> bool:
        """It is."""
        return True


def _publish(temporary: Path, path: Path, exclusive: bool) -> None:
    """Rename, so that the file and its name survive a power cut; a link refuses a name that is taken."""
    _sync(temporary)
    if exclusive:
        os.link(temporary, path)
        temporary.unlink()
    else:
        temporary.replace(path)
    _sync(path.parent)
    _sync(path.parent.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

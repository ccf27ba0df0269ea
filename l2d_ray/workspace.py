"""The workspace: one folder, on a disk or an object store, for everything the stages leave behind."""

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

WRITERS = {
    "dataset": "jobs/prepare_data.py",
    "memory": "jobs/build_memory.py",
    "index": "jobs/build_index.py",
    "reports": "jobs/evaluate.py",
}
"""Jobs by the folder that they write. The folder of jobs/finetune.py has any other name."""


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
        """Return the workspace at `uri`, without creating anything. Raises InputError for a URI of no filesystem."""
        if "://" not in uri:
            path = Path(uri).expanduser().resolve()
            return cls(str(path), pafs.LocalFileSystem(), str(path))
        try:
            filesystem, root = pafs.FileSystem.from_uri(uri)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"workspace={uri!r}: {error}; give a folder or a URI that pyarrow.fs opens") from None
        return cls(uri, filesystem, root.rstrip("/"))

    def path(self, relative: str) -> str:
        """Return the filesystem's path of `relative`."""
        return f"{self.root}/{relative}" if relative else self.root

    def exists(self, relative: str) -> bool:
        """Return whether a file or folder exists."""
        return bool(self.filesystem.get_file_info(self.path(relative)).type != pafs.FileType.NotFound)

    def files(self, folder: str, suffix: str = "") -> list[str]:
        """Return the relative paths of all files below `folder`, sorted; none if the folder does not exist."""
        found = self.filesystem.get_file_info(
            pafs.FileSelector(self.path(folder), recursive=True, allow_not_found=True)
        )
        paths = [info.path for info in found if info.type == pafs.FileType.File and info.path.endswith(suffix)]
        return sorted(path[len(self.root) + 1 :] for path in paths)

    def folders(self) -> list[str]:
        """Return the names of the folders of the workspace, sorted."""
        found = self.filesystem.get_file_info(pafs.FileSelector(self.root, allow_not_found=True))
        return sorted(info.base_name for info in found if info.type == pafs.FileType.Directory)

    def copy(self, folder: str, to: "Workspace", target: str) -> None:
        """Copy all files below `folder` to below `target` of another workspace, each as by `create`."""
        for path in self.files(folder):
            name = path.removeprefix(f"{folder}/")
            with self.filesystem.open_input_stream(self.path(path)) as source, to.create(f"{target}/{name}") as stream:
                shutil.copyfileobj(source, stream)

    def delete(self, relative: str) -> None:
        """Remove one file or folder, if it exists."""
        info = self.filesystem.get_file_info(self.path(relative))
        if info.type == pafs.FileType.Directory:
            self.filesystem.delete_dir(info.path)
        elif info.type == pafs.FileType.File:
            self.filesystem.delete_file(info.path)

    @contextmanager
    def create(self, relative: str, exclusive: bool = False) -> Iterator[pa.NativeFile]:
        """Open a stream whose content appears at `relative` when the block ends.

        On a disk it is a temporary file next to the target, synced and renamed, so that the target appears whole or not
        at all. An object store shows an object when its upload ends, but a block that raises may leave a part of it.
        Therefore a record must not name a file before it is complete. `exclusive` raises FileExistsError if the target
        exists, on a disk even in a race. Raises OSError (no space left, read-only, …) with the path in it.
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
        """Read one JSON object. Raises InputError if it is missing or damaged."""
        try:
            with self.filesystem.open_input_stream(self.path(relative)) as stream:
                value = json.loads(stream.read())
        except FileNotFoundError:
            raise InputError(f"{self.path(relative)}: not found; run {writer_of(relative)} first") from None
        except ValueError as error:
            raise self._damaged(relative, f"not JSON ({error})") from None
        if not isinstance(value, dict):
            raise self._damaged(relative, "no JSON object")
        return value

    def _damaged(self, relative: str, problem: str) -> InputError:
        remedy = f"delete it and run {writer_of(relative)} again"
        return InputError(f"{self.path(relative)}: {problem}, the file is damaged; {remedy}")


class DigestingSink(io.RawIOBase):
    """A binary file that hashes and counts what is written to it."""

    def __init__(self, stream: pa.NativeFile) -> None:
        self._stream, self._digest, self.count = stream, hashlib.sha256(), 0

    @property
    def sha256(self) -> str:
        """Checksum of the content written so far."""
        return self._digest.hexdigest()

    def write(self, data: Any) -> int:
        """Write anything that has a buffer, and return its size in bytes."""
        self._stream.write(data)
        self._digest.update(data)
        size = memoryview(data).nbytes
        self.count += size
        return size

    def writable(self) -> bool:
        """Return True."""
        return True


def writer_of(relative: str) -> str:
    """Return the job that writes a file of the workspace."""
    return WRITERS.get(relative.partition("/")[0], "jobs/finetune.py")


def _publish(temporary: Path, path: Path, exclusive: bool) -> None:
    """Rename a file such that it and its name survive a power cut. A link refuses a name that is taken."""
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

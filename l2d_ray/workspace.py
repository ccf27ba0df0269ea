"""The workspace: one folder, on a disk or an object store, for everything the stages leave behind."""

import hashlib
import io
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pyarrow import fs as pafs

from l2d_ray.errors import InputError
from l2d_ray.storage import LocalStorage, ObjectStorage, open_storage

WRITERS = {
    "dataset": "jobs/prepare_data.py",
    "memory": "jobs/build_memory.py",
    "index": "jobs/build_index.py",
    "recommenders": "jobs/train.py",
    "fusions": "jobs/evaluate.py",
    "reports": "jobs/evaluate.py",
    "export": "jobs/export_samples.py",
}
"""Jobs by the folder that they write. The folder of jobs/finetune.py has any other name."""


@dataclass(frozen=True)
class Workspace:
    """Files below one root, addressed by relative paths with forward slashes."""

    uri: str
    """A folder, or a URI: s3://…, gs://… or file://…."""
    storage: LocalStorage | ObjectStorage

    @classmethod
    def open(cls, uri: str) -> "Workspace":
        """Return the workspace at `uri`, without creating anything. Raises InputError for a URI that cannot be used."""
        storage = open_storage(uri)
        return cls(storage.root if isinstance(storage, LocalStorage) else uri, storage)

    @property
    def filesystem(self) -> pafs.FileSystem:
        """The filesystem to read with."""
        return self.storage.filesystem

    @property
    def is_local(self) -> bool:
        """Whether the workspace is a folder on a disk."""
        return isinstance(self.storage, LocalStorage)

    def path(self, relative: str) -> str:
        """Return the filesystem's path of `relative`."""
        return f"{self.storage.root}/{relative}" if relative else self.storage.root

    def check(self) -> None:
        """Check an object store before work begins; one request.

        Raises InputError if two writers could overwrite each other there, and OSError if it cannot be written to.
        """
        self.storage.check()

    def exists(self, relative: str) -> bool:
        """Return whether a file or folder exists."""
        return bool(self.filesystem.get_file_info(self.path(relative)).type != pafs.FileType.NotFound)

    def files(self, folder: str, suffix: str = "") -> list[str]:
        """Return the relative paths of all files below `folder`, sorted; none if the folder does not exist."""
        found = [path[len(self.path("")) + 1 :] for path in self.storage.files(self.path(folder))]
        return sorted(path for path in found if path.endswith(suffix))

    def times(self, folder: str) -> dict[str, float]:
        """Return the Unix time at which each file below `folder` was written, by relative path."""
        start = len(self.path("")) + 1
        return {path[start:]: time for path, time in self.storage.times(self.path(folder)).items()}

    def remove(self, paths: Iterable[str]) -> None:
        """Remove files, as far as they exist, and the folders on a disk that this empties."""
        self.storage.remove([self.path(path) for path in paths])

    def folders(self) -> list[str]:
        """Return the names of the folders of the workspace, sorted."""
        found = self.filesystem.get_file_info(pafs.FileSelector(self.path(""), allow_not_found=True))
        return sorted(info.base_name for info in found if info.type == pafs.FileType.Directory)

    def copy(self, folder: str, to: "Workspace", target: str) -> None:
        """Copy all files below `folder` to below `target` of another workspace, each as by `create`."""
        for path in self.files(folder):
            name = path.removeprefix(f"{folder}/")
            with self.filesystem.open_input_stream(self.path(path)) as source, to.create(f"{target}/{name}") as stream:
                shutil.copyfileobj(source, stream)

    def delete(self, relative: str) -> None:
        """Remove one file or folder, if it exists."""
        self.storage.delete(self.path(relative))

    @contextmanager
    def create(self, relative: str) -> Iterator[Any]:
        """Open a binary stream whose content appears at `relative` when the block ends.

        It appears whole or, if the block raises or the process dies, not at all. Raises OSError (no space left,
        read-only, …) with the path in it.
        """
        with self._naming(relative), self.storage.create(self.path(relative)) as stream:
            yield stream

    def write_json(self, relative: str, value: dict[str, Any], exclusive: bool = False) -> None:
        """Write one JSON object, whole or not at all.

        `exclusive` raises FileExistsError if the file exists; of writers in a race, one wins. Raises OSError as
        `create` does.
        """
        with self._naming(relative):
            content = (json.dumps(value, indent=1) + "\n").encode()
            self.storage.write(self.path(relative), content, new=exclusive)

    def read_json(self, relative: str) -> dict[str, Any]:
        """Read one JSON object. Raises InputError if it is missing or damaged."""
        try:
            value = json.loads(self.storage.read(self.path(relative)))
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

    @contextmanager
    def _naming(self, relative: str) -> Iterator[None]:
        """Put the path into every OSError."""
        try:
            yield
        except OSError as error:
            if self.path(relative) in str(error):
                raise
            raise OSError(f"{error} (writing {self.path(relative)})") from error


class DigestingSink(io.RawIOBase):
    """A binary file that hashes and counts what is written to it."""

    def __init__(self, stream: Any) -> None:
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

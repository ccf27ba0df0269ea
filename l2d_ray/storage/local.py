"""A folder on a disk."""

import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs


@dataclass(frozen=True)
class LocalStorage:
    """A folder on a disk. Implements `Storage`.

    A new file is a temporary one next to its target, synced and renamed.
    """

    root: str
    filesystem: pafs.FileSystem = field(default_factory=pafs.LocalFileSystem)

    @contextmanager
    def create(self, path: str, new: bool = False) -> Iterator[Any]:
        """Open a stream, as `Storage.create` says; `new` as in `write`."""
        temporary, target = Path(f"{path}.{uuid.uuid4().hex[:8]}.tmp"), Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with self.filesystem.open_output_stream(str(temporary)) as stream:
                yield stream
            _publish(temporary, target, new)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def write(self, path: str, content: bytes, new: bool = False) -> None:
        """Write a whole file, as `Storage.write` says."""
        if new and Path(path).exists():
            raise FileExistsError(f"{path}: exists")
        with self.create(path, new) as stream:
            stream.write(content)

    def read(self, path: str) -> bytes:
        """Return the content of a file, as `Storage.read` says."""
        return Path(path).read_bytes()

    def delete(self, path: str) -> None:
        """Remove a file or folder, as `Storage.delete` says."""
        target = Path(path)
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)

    def files(self, folder: str) -> list[str]:
        """Return the paths of all files below a folder, as `Storage.files` says."""
        return list(self.times(folder))

    def times(self, folder: str) -> dict[str, float]:
        """Return when each file below a folder was written, as `Storage.times` says."""
        found = self.filesystem.get_file_info(pafs.FileSelector(folder, recursive=True, allow_not_found=True))
        return {info.path: info.mtime_ns / 1e9 for info in found if info.type == pafs.FileType.File}

    def remove(self, paths: Sequence[str]) -> None:
        """Remove files and the folders that this empties, as `Storage.remove` says."""
        folders = set()
        for path in map(Path, paths):
            path.unlink(missing_ok=True)
            folders |= {folder for folder in path.parents if len(folder.parts) > len(Path(self.root).parts) + 1}
        for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
            with suppress(OSError):  # another file is in it
                folder.rmdir()

    def check(self) -> None:
        """Do nothing: a local disk keeps the promises, and a full or read-only one is reported by the first write."""


def _publish(temporary: Path, path: Path, new: bool) -> None:
    """Rename a file such that it and its name survive a power cut. A link refuses a name that is taken."""
    _sync(temporary)
    if new:
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

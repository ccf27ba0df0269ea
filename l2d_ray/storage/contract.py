"""The contract of a place for files."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from pyarrow import fs as pafs


class Storage(Protocol):
    """Files below a root. Paths are those of `filesystem`."""

    @property
    def filesystem(self) -> pafs.FileSystem:
        """The filesystem to read and list with."""
        ...

    @property
    def root(self) -> str:
        """Path of the root, without a slash at its end."""
        ...

    def create(self, path: str) -> AbstractContextManager[Any]:
        """Open a binary stream. The file appears whole when the block ends; if the block raises, nothing appears."""
        ...

    def write(self, path: str, content: bytes, new: bool = False) -> None:
        """Write a whole file. With `new`, raises FileExistsError if the file exists, also in a race."""
        ...

    def read(self, path: str) -> bytes:
        """Return the content of a file. Raises FileNotFoundError if it is missing."""
        ...

    def delete(self, path: str) -> None:
        """Remove a file, or a folder with all that is in it, if it exists."""
        ...

    def files(self, folder: str) -> list[str]:
        """Return the paths of all files below a folder; none if it does not exist."""
        ...

    def times(self, folder: str) -> dict[str, float]:
        """Return the Unix time at which each file below a folder was written, by path."""
        ...

    def remove(self, paths: Sequence[str]) -> None:
        """Remove files, as far as they exist. On a disk, also the folders that this empties."""
        ...

    def check(self) -> None:
        """Raise InputError or OSError if nothing can be written here, or if two writers could overwrite each other."""
        ...

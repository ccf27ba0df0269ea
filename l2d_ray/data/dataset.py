"""The prepared dataset of a workspace: the items, the histories in parts, and `dataset/dataset.json`, written last.

All data are plain Parquet: `schema.ITEMS` and `schema.HISTORIES`. The parts, in the order of the manifest, hold the
users in the order of (user_hash, user_id). The name of a part has a digest of its content, so that a new dataset never
overwrites a part that the old manifest lists.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from l2d_ray.data.histories import Lists
from l2d_ray.errors import InputError
from l2d_ray.schema import HISTORIES, ITEMS, Split
from l2d_ray.workspace import Workspace

FORMAT_VERSION = 1
MANIFEST = "dataset/dataset.json"
ITEMS_FILE = "dataset/items.parquet"
HISTORIES_FOLDER = "dataset/histories"
SAMPLE_SPLITS = (Split.TRAIN, Split.VALID, Split.TEST)

_GROUP_USERS = 10_000
_GROUP_INTERACTIONS = 1_000_000
_REMEDY = "run jobs/prepare_data.py again"


@dataclass(frozen=True)
class Part:
    """Entry of the manifest for one file of histories."""

    path: str
    users: int
    interactions: int
    samples: dict[str, int]
    """Number of samples by the lower-case name of the split."""


def write_part(workspace: Workspace, number: int, histories: pa.Table) -> tuple[Part, int]:
    """Write one part (`schema.HISTORIES`, at least one user) and return its entry and its `content_sum`.

    Row groups are small (10,000 users, about a million interactions), so that a range of users is read without the
    rest.
    """
    content = content_sum(histories)
    path = f"{HISTORIES_FOLDER}/part-{number:05d}-{content % 2**64:016x}.parquet"
    interactions = len(Lists.of(histories["item_indices"]).values)
    group = max(1, min(_GROUP_USERS, _GROUP_INTERACTIONS * len(histories) // interactions))
    with workspace.create(path) as stream:
        pq.write_table(histories, stream, row_group_size=group, compression="zstd")
    counts = np.bincount(Lists.of(histories["splits"]).values, minlength=max(Split) + 1)
    samples = {split.name.lower(): int(counts[split]) for split in SAMPLE_SPLITS}
    return Part(path, len(histories), interactions, samples), content


def content_sum(histories: pa.Table) -> int:
    """Return the sum of the SHA-256 of every user modulo 2^256, a digest that does not depend on the parts.

    The order of the users needs no place in it, because it follows from the user ids.
    """
    total = 0
    columns = [Lists.of(histories[name]) for name in ("item_indices", "timestamps", "splits")]
    raw = [(memoryview(lists.values.tobytes()), lists.offsets * lists.values.itemsize) for lists in columns]
    for user, user_id in enumerate(histories["user_id"].to_pylist()):
        digest = hashlib.sha256(f"{len(user_id.encode())}:{user_id}".encode())
        for values, offsets in raw:
            digest.update(values[offsets[user] : offsets[user + 1]])
        total += int.from_bytes(digest.digest(), "big")
    return total % 2**256


def write_manifest(
    workspace: Workspace, items: pa.Table, parts: list[tuple[Part, int]], about: dict[str, Any]
) -> dict[str, Any]:
    """Make these parts the dataset: write the items, then the manifest, and remove parts that it does not list.

    A crash leaves the old dataset or none, never a manifest whose files are missing or belong to another one.
    """
    digest = hashlib.sha256()
    for row in items.to_pylist():
        digest.update(repr((row["item_index"], row["item_id"], row["title"])).encode())
    digest.update((sum(content for _, content in parts) % 2**256).to_bytes(32, "big"))
    manifest = {
        "format_version": FORMAT_VERSION,
        "digest": digest.hexdigest(),
        **about,
        "files": [asdict(part) for part, _ in parts],
    }
    workspace.delete(MANIFEST)
    with workspace.create(ITEMS_FILE) as stream:
        pq.write_table(items, stream, compression="zstd")
    workspace.write_json(MANIFEST, manifest)
    listed = {part.path for part, _ in parts}
    for path in workspace.files(HISTORIES_FOLDER):
        if path not in listed:
            workspace.delete(path)
    return manifest


class Dataset:
    """Reader of a prepared dataset. `manifest` is the checked content of `dataset/dataset.json`."""

    def __init__(self, workspace: Workspace, manifest: dict[str, Any]):
        self.workspace = workspace
        self.manifest = manifest
        self.parts = [Part(**part) for part in manifest["files"]]

    @classmethod
    def open(cls, workspace: Workspace) -> "Dataset":
        """Open the dataset of a workspace. Raises InputError if there is none, or if its format or content is wrong."""
        manifest = workspace.read_json(MANIFEST)
        where = workspace.path(MANIFEST)
        version = manifest.get("format_version")
        if version != FORMAT_VERSION:
            raise InputError(f"{where}: format_version={version!r}, not {FORMAT_VERSION}; {_REMEDY}")
        try:
            return cls(workspace, manifest)
        except (KeyError, TypeError) as error:
            raise InputError(f"{where}: damaged ({error}); {_REMEDY}") from None

    @property
    def digest(self) -> str:
        """SHA-256 of items and histories, independent of encoding and number of parts."""
        return str(self.manifest["digest"])

    @property
    def num_users(self) -> int:
        """Number of users in all parts."""
        return sum(part.users for part in self.parts)

    def num_samples(self, split: Split) -> int:
        """Return the number of samples of one split."""
        return sum(part.samples[split.name.lower()] for part in self.parts)

    def items(self) -> pa.Table:
        """Read all items (`schema.ITEMS`); the row number is the item_index."""
        with self._open(ITEMS_FILE) as file:
            return pq.read_table(file).cast(ITEMS)

    def iter_users(self, start: int = 0, stop: int | None = None, batch_users: int = 1_000) -> Iterator[pa.Table]:
        """Yield users start to stop - 1 of the dataset as tables (`schema.HISTORIES`) of at most `batch_users` rows.

        Only the row groups that hold these users are read, one after the other.
        """
        stop = self.num_users if stop is None else min(stop, self.num_users)
        first = 0
        for part in self.parts:
            if first < stop and first + part.users > start:
                yield from self._part_users(part, max(start - first, 0), min(stop - first, part.users), batch_users)
            first += part.users

    def _part_users(self, part: Part, start: int, stop: int, batch_users: int) -> Iterator[pa.Table]:
        with self._open(part.path) as stream:
            file = pq.ParquetFile(stream)
            first = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if first < stop and first + rows > start:
                    table = file.read_row_group(group).cast(HISTORIES)
                    table = table.slice(max(start - first, 0), min(stop, first + rows) - max(start, first))
                    yield from (table.slice(at, batch_users) for at in range(0, len(table), batch_users))
                first += rows

    def _open(self, path: str) -> pa.NativeFile:
        try:
            return self.workspace.filesystem.open_input_file(self.workspace.path(path))
        except FileNotFoundError:
            raise InputError(f"{self.workspace.path(path)}: not found, but dataset.json lists it; {_REMEDY}") from None

"""The prepared dataset of a workspace: items, histories, and the records that list their files, written last.

    dataset/dataset.json                    the first version: its settings, counts and files
    dataset/items.parquet                   its items
    dataset/histories/*.parquet             its histories
    dataset/versions/<n>.json               version n, from 2 on: grown, with data.append=true, erased from or compacted
    dataset/items/<n>/*.parquet             the items that it added, if any, or all items
    dataset/histories/<n>/*.parquet         the histories that it added (`generations`) or wrote again

All data are plain Parquet: `schema.ITEMS` and `schema.HISTORIES`. The name of a part has a digest of its content, so
that a new dataset never overwrites a part that an old record lists.
"""

import hashlib
from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from l2d_ray.data.generations import GROUP_USERS, Generation, Part, merge, newest, open_part
from l2d_ray.data.histories import Lists
from l2d_ray.data.versions import (
    VERSIONS_FOLDER,
    GenerationRecord,
    Version,
    commit_version,
    version_numbers,
    version_path,
)
from l2d_ray.errors import InputError
from l2d_ray.schema import ITEMS, Split
from l2d_ray.workspace import Workspace

FORMAT_VERSION = 1
MANIFEST = "dataset/dataset.json"
ITEMS_FILE = "dataset/items.parquet"
ITEMS_FOLDER = "dataset/items"
HISTORIES_FOLDER = "dataset/histories"
SAMPLE_SPLITS = (Split.TRAIN, Split.VALID, Split.TEST)

_GROUP_INTERACTIONS = 1_000_000
_REMEDY = "run jobs/prepare_data.py again"


def write_part(workspace: Workspace, number: int, histories: pa.Table, version: int = 1) -> tuple[Part, int]:
    """Write one part (`schema.HISTORIES`, at least one user) of a version; return its entry and its `content_sum`.

    Row groups are small (10,000 users, about a million interactions), so that a range of users is read without the
    rest.
    """
    content = content_sum(histories)
    path = f"{_folder(version)}/part-{number:05d}-{content % 2**64:016x}.parquet"
    interactions = len(Lists.of(histories["item_indices"]).values)
    group = max(1, min(GROUP_USERS, _GROUP_INTERACTIONS * len(histories) // interactions))
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
    """Make these parts the dataset: write the items, then the manifest, and remove all else of older datasets.

    A crash leaves the old dataset or none, never a manifest whose files are missing or belong to another one.
    """
    manifest = {
        "format_version": FORMAT_VERSION,
        "digest": _digest("", items, parts),
        **about,
        "files": [asdict(part) for part, _ in parts],
    }
    workspace.delete(MANIFEST)
    workspace.delete(VERSIONS_FOLDER)
    with workspace.create(ITEMS_FILE) as stream:
        pq.write_table(items, stream, compression="zstd")
    workspace.write_json(MANIFEST, manifest)
    _remove_unlisted(workspace, [HISTORIES_FOLDER, ITEMS_FOLDER], {part.path for part, _ in parts})
    return manifest


def write_version(
    dataset: "Dataset",
    new_items: pa.Table,
    new_users: int,
    parts: list[tuple[Part, int]],
    refused: dict[str, int],
    changed_titles: int,
) -> "Dataset":
    """Make a dataset, these items and these parts the next version, and return it.

    `refused` and `changed_titles` are recorded (`Version`). Raises FileExistsError if another run made that
    version first. A crash leaves the old version or the new one.
    """
    workspace, old = dataset.workspace, dataset.version
    number, digest = old.number + 1, _digest(dataset.digest, new_items, parts)
    item_file = f"{ITEMS_FOLDER}/{number}/{digest[:16]}.parquet"
    if len(new_items):
        with workspace.create(item_file) as stream:
            pq.write_table(new_items, stream, compression="zstd")
    added = GenerationRecord(version=digest, new_users=new_users, files=[part for part, _ in parts])
    version = Version(
        number=number,
        lineage=[*old.lineage, digest],
        erasures=old.erasures,
        generations=[*old.generations, added],
        item_files=[*old.item_files, *([item_file] if len(new_items) else [])],
        refused=refused,
        changed_titles=changed_titles,
    )
    commit_version(workspace, version)
    listed = {item_file, *(part.path for part in added.files)}
    _remove_unlisted(workspace, [_folder(number), f"{ITEMS_FOLDER}/{number}"], listed, ".parquet")
    return Dataset(workspace, dataset.manifest, version)


class Dataset:
    """Reader of one version of a prepared dataset."""

    def __init__(self, workspace: Workspace, manifest: dict[str, Any], version: Version):
        self.workspace = workspace
        self.manifest = manifest
        """The checked content of `dataset/dataset.json`."""
        self.version = version
        self.generations = [
            Generation(workspace, record.version, record.new_users, record.files) for record in version.generations
        ]

    @classmethod
    def open(cls, workspace: Workspace, digest: str | None = None) -> "Dataset":
        """Open the newest version of the dataset of a workspace, or the one with this digest.

        Raises InputError if it is not there, or if its format or content is wrong.
        """
        manifest, versions = read_versions(workspace)
        for version in versions:
            if digest in (None, version.lineage[-1]):
                return cls(workspace, manifest, version)
        raise InputError(f"{workspace.path(MANIFEST)}: has no version {digest}; run jobs/build_memory.py again")

    @property
    def digest(self) -> str:
        """SHA-256 of items and histories, and of the versions before; independent of encoding and number of parts."""
        return self.version.lineage[-1]

    @property
    def parts(self) -> list[Part]:
        """The files of all generations."""
        return [part for generation in self.generations for part in generation.parts]

    @property
    def num_users(self) -> int:
        """Number of users."""
        return sum(generation.new_users for generation in self.generations)

    def num_samples(self, split: Split) -> int:
        """Return the number of samples of one split."""
        return sum(generation.num_samples(split) for generation in self.generations)

    def items(self) -> pa.Table:
        """Read all items (`schema.ITEMS`); the row number is the item_index."""
        tables = []
        for path in self.version.item_files:
            with open_part(self.workspace, path) as file:
                tables.append(pq.read_table(file).cast(ITEMS))
        return pa.concat_tables(tables)

    def iter_users(self, start: int = 0, stop: int | None = None, batch_users: int = 1_000) -> Iterator[pa.Table]:
        """Yield users start to stop - 1 of the dataset as tables (`schema.HISTORIES`) of at most `batch_users` rows.

        Users are in the order of (user_hash, user_id), each with the whole history. Of a dataset that did not grow,
        only the row groups that hold these users are read.
        """
        if len(self.generations) == 1:
            yield from self.generations[0].iter_users(start, stop, batch_users)
            return
        first, stop = 0, self.num_users if stop is None else stop
        for users in merge([generation.iter_users(batch_users=GROUP_USERS) for generation in self.generations]):
            for at in range(max(start - first, 0), min(stop - first, len(users)), batch_users):
                yield users.slice(at, min(batch_users, stop - first - at))
            first += len(users)
            if first >= stop:
                return

    def find_users(self, user_ids: pa.Array, user_hashes: NDArray[np.int64]) -> pa.Table:
        """Return the histories (`schema.HISTORIES`) of those of some users whom the dataset has.

        `user_hashes` are the hashes of the users, ascending. Only row groups whose range of hashes has one are read.
        """
        return newest([generation.find_users(user_ids, user_hashes) for generation in self.generations])


def read_versions(workspace: Workspace) -> tuple[dict[str, Any], Iterator[Version]]:
    """Return the checked content of `dataset/dataset.json`, and the versions from the newest on, read as they are used.

    The first version comes last, also if a compaction has removed its files. Raises InputError as `Dataset.open`.
    """
    manifest, where = workspace.read_json(MANIFEST), workspace.path(MANIFEST)
    format_version = manifest.get("format_version")
    if format_version != FORMAT_VERSION:
        raise InputError(f"{where}: format_version={format_version!r}, not {FORMAT_VERSION}; {_REMEDY}")
    try:
        first = _first_version(manifest)
    except (KeyError, TypeError) as error:
        raise InputError(f"{where}: damaged ({error}); {_REMEDY}") from None
    return manifest, chain(_later_versions(workspace, first), [first])


def _digest(previous: str, items: pa.Table, parts: Sequence[tuple[Part, int]]) -> str:
    """Return the digest of a version that adds these items and parts to the previous one."""
    digest = hashlib.sha256(previous.encode())
    for row in items.to_pylist():
        digest.update(repr((row["item_index"], row["item_id"], row["title"])).encode())
    digest.update((sum(content for _, content in parts) % 2**256).to_bytes(32, "big"))
    return digest.hexdigest()


def _folder(version: int) -> str:
    return HISTORIES_FOLDER if version == 1 else f"{HISTORIES_FOLDER}/{version}"


def _first_version(manifest: dict[str, Any]) -> Version:
    """Return the version that `dataset.json` describes. Raises KeyError or TypeError if it is damaged."""
    digest, parts = str(manifest["digest"]), [Part(**part) for part in manifest["files"]]
    users = sum(part.users for part in parts)
    return Version(
        number=1,
        lineage=[digest],
        generations=[GenerationRecord(version=digest, new_users=users, files=parts)],
        item_files=[ITEMS_FILE],
        refused=manifest.get("dropped", {}),
        changed_titles=0,
    )


def _later_versions(workspace: Workspace, first: Version) -> Iterator[Version]:
    """Yield the versions after the first, the newest first. Raises InputError for one that grew from another."""
    for number in version_numbers(workspace):
        version = Version.read(workspace, version_path(number))
        if version.lineage[0] != first.lineage[0]:
            raise InputError(
                f"{workspace.path(version_path(number))}: belongs to a dataset that was replaced meanwhile; delete"
                f" {workspace.path(VERSIONS_FOLDER)}, and append again"
            )
        yield version


def _remove_unlisted(workspace: Workspace, folders: Sequence[str], listed: Set[str], suffix: str = "") -> None:
    """Remove files of killed runs and of datasets that were replaced.

    With `suffix`, a file that another run is about to finish stays: the run will find that it came second.
    """
    for path in [path for folder in folders for path in workspace.files(folder, suffix)]:
        if path not in listed:
            workspace.delete(path)

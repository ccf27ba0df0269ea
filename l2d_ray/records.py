"""JSON records that the stages leave in the workspace, and the identity by which hidden states can be compared."""

import hashlib
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from l2d_ray.errors import InputError
from l2d_ray.workspace import Workspace, writer_of

FORMAT_VERSION = 1


class Record(BaseModel):
    """A JSON file of the workspace: immutable, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def read(cls, workspace: Workspace, path: str) -> Self:
        """Return the record at `path`. Raises InputError if it is missing or damaged."""
        try:
            return cls.model_validate(workspace.read_json(path))
        except ValidationError as error:
            where, problem = ".".join(str(part) for part in error.errors()[0]["loc"]), error.errors()[0]["msg"]
            remove = "the index's folder" if path.startswith("index/") and path.count("/") > 1 else "it"
            raise InputError(
                f"{workspace.path(path)}: {where}: {problem}; the file is damaged or of another version of l2d_ray:"
                f" delete {remove} and run {writer_of(path)} again"
            ) from None

    def digest(self) -> str:
        """Return the SHA-256 of the record."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def write(self, workspace: Workspace, path: str) -> None:
        """Write the record, atomically. Raises FileExistsError if the file exists: records do not change."""
        workspace.write_json(path, self.model_dump(), exclusive=True)


def record_numbers(workspace: Workspace, folder: str) -> list[int]:
    """Return the numbers of the records `<number>.json` in a folder, ascending."""
    return sorted(int(path.rpartition("/")[2].removesuffix(".json")) for path in workspace.files(folder, ".json"))


def add_record(workspace: Workspace, folder: str, number: int, record: Record) -> None:
    """Write the next numbered record of a folder. Raises FileExistsError if it is not the newest one then."""
    path = f"{folder}/{number}.json"
    record.write(workspace, path)
    if record_numbers(workspace, folder)[-1] > number:  # the number was free again, because its record expired
        workspace.delete(path)
        raise FileExistsError(f"{workspace.path(path)}: there is a newer one")


class MemoryIdentity(Record):
    """Everything that decides the numbers in a memory. States that differ in any of it cannot be compared."""

    format_version: int = FORMAT_VERSION
    base_model: str
    """Digest of the base model."""
    num_layers: int
    adapter: str | None
    """Digest of the adapter that was merged in."""
    tokenizer: str
    """Digest of the tokenizer."""
    template: str
    """Digest of the prompt template."""
    dtype: str
    """Number format that the model computed in; states are always stored as float16."""
    max_items: int
    stride: int
    dimension: int
    num_shards: int

    def differences(self, other: "MemoryIdentity") -> list[str]:
        """Return `name (theirs, now ours)` for each field in which two memories differ."""
        ours, theirs = self.model_dump(), other.model_dump()
        return [
            f"{name} ({_short(theirs[name])}, now {_short(ours[name])})" for name in ours if ours[name] != theirs[name]
        ]


def check_query(indexed: MemoryIdentity, ours: MemoryIdentity) -> None:
    """Raise InputError, naming what differs, if queries would not be encoded as the rows of a memory were."""
    shards = {"num_shards": indexed.num_shards}  # says where rows are, and nothing about their numbers
    differences = ours.model_copy(update=shards).differences(indexed)
    if differences:
        raise InputError(
            f"the memory was made with another {', '.join(differences)}; give model.*, prompt.* and history.* as they"
            " were for jobs/build_memory.py, or build the memory again"
        )


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)

"""Records of the versions of a dataset, of which each but the first is a small file that names old and new parts.

The first version is `dataset/dataset.json`. Version n is `dataset/versions/<n>.json`: a record that is created once, so
that of two runs that change the dataset at the same time one wins, and that never changes. A version adds a generation,
is without what was erased (`erasure`), or has the content of the one before in fewer files (`compaction`).
"""

from pydantic import Field

from l2d_ray.data.generations import Part
from l2d_ray.records import Record, add_record, record_numbers
from l2d_ray.workspace import Workspace

VERSIONS_FOLDER = "dataset/versions"


class GenerationRecord(Record):
    """Files of histories that one version added."""

    version: str
    """Digest of that version. After an erasure or a merge it is another one, which no version has. So no unit of the
    memory that was planned before passes for a unit of the changed generation."""
    new_users: int
    """Users that no earlier generation has."""
    files: list[Part]


class Version(Record):
    """A dataset at one point in time."""

    number: int
    lineage: list[str]
    """Digests of all versions up to this one, the oldest first. A digest stands for the content and all before it. A
    compaction leaves out those that no snapshot needs, but the first."""
    erasures: list[str] = Field([], exclude_if=lambda erasures: not erasures)
    """Digests in the lineage of the versions that erased something."""
    generations: list[GenerationRecord]
    """Generations, the oldest first."""
    item_files: list[str]
    """Files of the items (`schema.ITEMS`), in the order of item_index."""
    refused: dict[str, int]
    """Interactions that were given for this version and did not enter, by reason (`growth`)."""
    changed_titles: int
    """Items that were given with another title, which was not taken."""

    def since(self, digest: str) -> list[str]:
        """Return the digests that follow one in the lineage; none if it is not there."""
        return self.lineage[self.lineage.index(digest) + 1 :] if digest in self.lineage else []

    def erased_since(self, digest: str) -> str:
        """Return the digest of the last erasure among those that follow a version with nothing else in between."""
        for later in self.since(digest):
            if later not in self.erasures:
                break
            digest = later
        return digest


def version_path(number: int) -> str:
    """Return the path of the record of a version, from 2 on."""
    return f"{VERSIONS_FOLDER}/{number}.json"


def version_numbers(workspace: Workspace) -> list[int]:
    """Return the numbers of the versions that have a record, the newest first."""
    return record_numbers(workspace, VERSIONS_FOLDER)[::-1]


def commit_version(workspace: Workspace, version: Version) -> None:
    """Write the record of the next version. Raises FileExistsError if it is not the newest one then."""
    add_record(workspace, VERSIONS_FOLDER, version.number, version)

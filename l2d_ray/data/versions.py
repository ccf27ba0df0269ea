"""Records of the versions of a dataset, of which each but the first is a small file that names old and new parts.

The first version is `dataset/dataset.json`. Version n is `dataset/versions/<n>.json`: a record that is created once, so
that of two runs that append at the same time one wins, and that never changes.
"""

from l2d_ray.data.generations import Part
from l2d_ray.records import Record
from l2d_ray.workspace import Workspace

VERSIONS_FOLDER = "dataset/versions"


class GenerationRecord(Record):
    """Files of histories that one version added."""

    version: str
    """Digest of that version."""
    new_users: int
    """Users that no earlier generation has."""
    files: list[Part]


class Version(Record):
    """A dataset at one point in time."""

    number: int
    lineage: list[str]
    """Digests of all versions up to this one, the oldest first. A digest stands for the content and all before it."""
    generations: list[GenerationRecord]
    """Generations, the oldest first."""
    item_files: list[str]
    """Files of the items (`schema.ITEMS`), in the order of item_index."""
    refused: dict[str, int]
    """Interactions that were given for this version and did not enter, by reason (`growth`)."""
    changed_titles: int
    """Items that were given with another title, which was not taken."""


def version_path(number: int) -> str:
    """Return the path of the record of a version, from 2 on."""
    return f"{VERSIONS_FOLDER}/{number}.json"


def version_numbers(workspace: Workspace) -> list[int]:
    """Return the numbers of the versions that have a record, the newest first."""
    paths = workspace.files(VERSIONS_FOLDER, ".json")
    return sorted((int(path.rpartition("/")[2].removesuffix(".json")) for path in paths), reverse=True)

"""Removal of the indexes of snapshots that are not kept."""

from collections.abc import Iterator, Sequence

from l2d_ray.index.manifest import FOLDER, IndexManifest, PosteriorRecord, posterior_path, snapshot_folder
from l2d_ray.memory.manifest import Snapshot
from l2d_ray.workspace import Workspace

SHARED_FOLDERS = "moments", "transitions"
"""Folders of a snapshot that its indexes share."""


def remove_indexes(workspace: Workspace, kept: Sequence[Snapshot]) -> list[str]:
    """Remove the indexes of all snapshots but the kept ones, and return the paths of the removed files.

    The files that an index of a kept snapshot names stay, wherever they are. An index of a kept snapshot that is not
    complete goes, too, because it may need what is removed: a build that is running fails, and starts again.
    """
    snapshots = {snapshot_folder(snapshot.number, snapshot.digest()) for snapshot in kept}
    files = [path for path in workspace.files(FOLDER) if path.count("/") > 1]  # not index/settings.json
    manifests = [path for path in files if _is_manifest(path) and path.split("/")[1] in snapshots]
    indexes = {path.rpartition("/")[0] for path in manifests}
    named = {file for path in manifests for file in _named(workspace, path)}

    def stays(path: str) -> bool:
        _, snapshot, label, *_ = path.split("/")
        shared = snapshot in snapshots and label in SHARED_FOLDERS
        return shared or path in named or f"{FOLDER}/{snapshot}/{label}" in indexes

    removed = [path for path in files if not stays(path)]
    for path in removed:
        workspace.delete(path)
    return removed


def _is_manifest(path: str) -> bool:
    return path.count("/") == 3 and path.rpartition("/")[2].startswith("index-")


def _named(workspace: Workspace, manifest: str) -> Iterator[str]:
    """Yield the paths of the files that the records of an index name."""
    yield from (file.path for file in IndexManifest.read(workspace, manifest).all_files())
    posterior = posterior_path(manifest)
    if workspace.exists(posterior):
        yield from (transitions.file.path for transitions in PosteriorRecord.read(workspace, posterior).transitions)

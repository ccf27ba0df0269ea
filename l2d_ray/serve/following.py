"""The search for an index that an endpoint is to follow (`serve.follow`), without Ray."""

import logging

from l2d_ray.config import Config
from l2d_ray.data.dataset import Dataset
from l2d_ray.errors import InputError
from l2d_ray.index.manifest import IndexManifest
from l2d_ray.serve.releases import Release, ReleaseFile
from l2d_ray.stages.index_plan import plan_index
from l2d_ray.stages.settings import for_queries
from l2d_ray.workspace import Workspace

logger = logging.getLogger(__name__)


class NewestIndex:
    """The index that jobs/build_index.py built last in the workspace of an endpoint.

    Each index is offered once, also if the process is replaced. So after jobs/promote.py has returned to an older one,
    that stays served until another index is built.
    """

    def __init__(self, file: ReleaseFile, config: Config) -> None:
        """Go on after the index that was offered last, or with that one again if its promotion was interrupted.

        `config` is that of the endpoint, with the settings that were given only. Raises InputError if there is no
        memory.
        """
        self._file, self._config = file, config
        self._known = "" if len(file.read()) > 1 else file.last_offered()
        self._path()

    def take(self) -> Release | None:
        """Return the release of an index that was built since the last call, if the endpoint is to serve it.

        An index of another model, or of a dataset that does not continue the served one, is left out with a warning.
        Raises InputError if the release is not complete.
        """
        path = self._path()
        if path == self._known:
            return None
        self._file.offer(path)
        self._known = path
        release, (served, *_) = Release.plan(self._config, self._file.first.recommenders), self._file.read()
        if release.version == served.version:
            return None
        if problem := _difference(served, release):
            logger.warning("%s: the endpoint does not follow it: %s", release.index, problem)
            return None
        return release

    def offer_again(self) -> None:
        """Offer the newest index once more, because its promotion failed."""
        self._known = ""
        self._file.offer("")

    def _path(self) -> str:
        """Return the path of its manifest; "" if there is none."""
        config = for_queries(self._config)
        path = plan_index(config).manifest
        return path if Workspace.open(config.workspace).exists(path) else ""


def _difference(served: Release, newer: Release) -> str:
    """Return in what the memories of two releases differ, other than that one continues the other; "" if in nothing."""
    old, new = (IndexManifest.read(Workspace.open(one.config.workspace), one.index) for one in (served, newer))
    if differences := new.identity.differences(old.identity):
        return f"its memory was made with another {', '.join(differences)}; promote it with jobs/promote.py"
    try:
        lineage = Dataset.open(Workspace.open(newer.config.workspace), new.dataset).version.lineage
    except InputError as error:
        return str(error)
    if old.dataset not in lineage:
        return "its dataset does not continue the served one; promote it with jobs/promote.py"
    return ""

"""Releases: what an endpoint serves, and the file by which its replicas agree on it.

A release is a configuration, the index that it names, and the recommenders next to L2D. The replicas of an endpoint
agree by one file in the workspace. The first release in it is served, the others are kept loaded.
`distributed/serving/promotion.py` replaces the served release in three steps:

1. It names the new release after the old one; every replica loads it.
2. It names the new release first; the gateways turn to it.
3. It names the new release alone, once no request that began with the old one is left.

Without a file, the endpoint serves the release that it was started with.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pydantic import Field

from l2d_ray.config import Config
from l2d_ray.errors import InputError
from l2d_ray.index.manifest import IndexManifest
from l2d_ray.index.sharding import IndexReader
from l2d_ray.memory.store import MemoryStore
from l2d_ray.recommenders.contract import Recommender
from l2d_ray.records import Record
from l2d_ray.serve.recommenders import find_served, make, runs_model, served_weights
from l2d_ray.stages.index_plan import plan_index
from l2d_ray.stages.settings import for_queries
from l2d_ray.workspace import Workspace

logger = logging.getLogger(__name__)


class Release(Record):
    """A configuration, the index that it names, and the weights of the recommenders that it names."""

    settings: dict[str, Any]
    """The configuration as JSON."""
    index: str
    """Path of the index manifest in the workspace of the configuration."""
    manifest: str
    """`IndexReader.digest` of that index."""
    recommenders: dict[str, str] = Field({})
    """Recommenders next to L2D, each with the checksum of its weights (`served_weights`)."""
    log_probabilities: list[str] = Field([])
    """Those of them whose scores are natural logarithms of probabilities."""

    @classmethod
    def plan(cls, config: Config, recommenders: Iterable[str] | None = None) -> "Release":
        """Return the release of a configuration. `recommenders` replaces its `serve.recommender`.

        Raises InputError if it has no index or no items, and for recommenders that cannot be served (`served_weights`).

        Does not check that the memory was made with the configured model: loading the model does.
        """
        names = config.serve.recommender if recommenders is None else recommenders
        config = for_queries(config)
        workspace, path = Workspace.open(config.workspace), plan_index(config).manifest
        if not workspace.exists(path):
            raise InputError(f"{workspace.path(path)}: not found; run jobs/build_index.py with the same settings first")
        reader = IndexReader.open(workspace, path)
        weights = served_weights(names, config, reader.manifest.dataset)
        release = cls(
            settings=config.model_dump(mode="json"),
            index=path,
            manifest=reader.digest,
            recommenders=weights,
            log_probabilities=[name for name in weights if find_served(name, config).options.log_probabilities],
        )
        release.items()
        return release

    @property
    def config(self) -> Config:
        """The configuration."""
        return Config(**self.settings)

    @property
    def version(self) -> str:
        """Digest of all that decides an answer: index, prior, settings of model and prompt, and recommenders."""
        index = self.config.index
        parts = {name: self.settings[name] for name in ("history", "model", "prompt", "recommend")}
        decisive = [self.manifest, index.prior_in(index.space), parts]
        if self.recommenders:
            decisive.append(self.recommenders)
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:12]

    def open(self) -> IndexReader:
        """Return a reader of the index. Raises InputError if the index is damaged or was replaced."""
        workspace = Workspace.open(self.config.workspace)
        reader = IndexReader.open(workspace, self.index)
        if reader.digest != self.manifest:
            raise InputError(
                f"{workspace.path(self.index)}: the index was replaced after this release was first served; run"
                " jobs/promote.py to serve the new one"
            )
        return reader

    def items(self) -> pa.Table:
        """Return the items of the memory (`schema.ITEMS`). Raises InputError if they are missing or damaged."""
        workspace = Workspace.open(self.config.workspace)
        return MemoryStore(workspace).items(IndexManifest.read(workspace, self.index).dataset)

    def make_recommenders(self) -> dict[str, Recommender]:
        """Make the recommenders next to L2D. They run on a CPU if none of them needs the language model.

        Leaves out those whose dataset or weights were replaced since the release was planned, and logs a warning. A
        replica that starts then can still load the next release. Raises InputError if weights are damaged.
        """
        config, names = self.config, self.recommenders.keys()
        if not runs_model(names, config):
            config = config.replace({"workers.gpus": 0.0})
        dataset = IndexManifest.read(Workspace.open(config.workspace), self.index).dataset
        made = {}
        for name, weights in self.recommenders.items():
            if _weights_now(name, config, dataset) == weights:
                made[name] = make(find_served(name, config), config)
            else:
                logger.warning("%s: replaced since this release was first served; run jobs/promote.py", name)
        return made


def _weights_now(name: str, config: Config, dataset: str) -> str | None:
    """Return the checksum of a recommender's weights in the workspace, or None if it cannot be served any more."""
    try:
        return served_weights([name], config, dataset)[name]
    except InputError:
        return None


class ReleaseList(Record):
    """Content of a release file: the served release, then others to keep loaded."""

    releases: list[Release]


@dataclass(frozen=True)
class ReleaseFile:
    """The release file of one endpoint."""

    uri: str
    """URI of the workspace that the endpoint was started with."""
    path: str
    """Path of the file in that workspace."""
    first: Release
    """Release that is served while the file does not exist."""

    def read(self) -> list[Release]:
        """Return the served release, then the others to keep loaded."""
        workspace = Workspace.open(self.uri)
        if not workspace.exists(self.path):
            return [self.first]
        return ReleaseList.read(workspace, self.path).releases

    def write(self, releases: Sequence[Release]) -> None:
        """Name these releases. Raises OSError if the workspace cannot be written to."""
        Workspace.open(self.uri).write_json(self.path, ReleaseList(releases=list(releases)).model_dump())

    def last_offered(self) -> str:
        """Return the path of the index that was offered to the endpoint last; at first, the one it was started with."""
        workspace = Workspace.open(self.uri)
        return str(workspace.read_json(self._offered)["index"]) if workspace.exists(self._offered) else self.first.index

    def offer(self, index: str) -> None:
        """Record the path of an index that is offered to the endpoint."""
        Workspace.open(self.uri).write_json(self._offered, {"index": index})

    def delete(self) -> None:
        """Delete what was written, after the endpoint has stopped."""
        for path in (self.path, self._offered):
            Workspace.open(self.uri).delete(path)

    @property
    def _offered(self) -> str:
        return f"{self.path}.offered"

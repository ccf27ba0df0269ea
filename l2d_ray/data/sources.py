"""Formats of raw data: one module each, all of them in SOURCES. A new one is a module and a line there."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from l2d_ray.config import Config
from l2d_ray.data import amazon, d3, demo, movielens, table
from l2d_ray.errors import InputError


class Source(Protocol):
    """Reader of one format. Every function raises InputError for missing or malformed files."""

    @property
    def NEEDS(self) -> Sequence[str]:
        """Keys of `data` that must be set, such as `items`."""

    def read_items(self, config: Config) -> Iterator[pa.Table]:
        """Yield all items (`columns.ITEMS`), some at a time, in the order of their files."""

    def interaction_files(self, config: Config) -> list[str]:
        """Return the files of interactions, in an order that breaks ties of time. One worker reads one file."""

    def read_interactions(self, path: str, config: Config, /) -> Iterator[pa.Table]:
        """Yield the interactions of one file (`columns.INTERACTIONS`), some at a time, in the order of the file."""


@runtime_checkable
class PublishedSource(Source, Protocol):
    """Reader of a format with a published split, which is kept as it is: no filter, and no new split."""

    def group(self, samples: pa.Table, find: Callable[[pa.Array], NDArray[np.int32]], files: Sequence[str]) -> pa.Table:
        """Return histories (`histories.BLOCK`) with a column `splits` from all samples of some users.

        `samples` is what `read_interactions` gave, prepared by `interactions.read`. `find` returns the candidate
        indices of item ids. `files` are the `interaction_files`.
        """


SOURCES: dict[str, Source] = {
    "amazon": amazon,
    "d3": d3,
    "demo": demo,
    "movielens": movielens,
    "table": table,
}
"""All sources, by their names in `data.source`."""


def source_of(config: Config) -> Source:
    """Return the source that `data.source` names.

    Raises InputError if there is none of that name, or if other settings of `data` do not suit it.
    """
    name = config.data.source
    if name not in SOURCES:
        raise InputError(f"data.source={name!r}: unknown; give one of {', '.join(SOURCES)}")
    source = SOURCES[name]
    for key in source.NEEDS:
        if getattr(config.data, key) is None:
            raise InputError(f"data.{key} is missing, which data.source={name!r} needs; give a file, a folder or a URI")
    if isinstance(source, PublishedSource) and (config.data.since or config.data.until):
        raise InputError(
            f"data.since and data.until do not apply to data.source={name!r}, whose split is published; leave them out"
        )
    return source


def check_source(config: Config) -> None:
    """Raise InputError for any problem that the settings and the first rows of the files show."""
    source = source_of(config)
    files = source.interaction_files(config)
    if not files:
        raise InputError(
            f"data.interactions={config.data.interactions!r}: no files there; give the folder of the files"
        )
    next(source.read_interactions(files[0], config), None)
    if config.data.items:
        next(source.read_items(config), None)

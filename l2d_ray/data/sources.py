"""Where raw data come from: one module per source, each a `Source`. A new one is a new module and a line here."""

from collections.abc import Iterator
from typing import Protocol

import pyarrow as pa

from l2d_ray.config import Config
from l2d_ray.data import amazon, d3, demo, movielens, table


class Source(Protocol):
    """Reads raw files as streams. Every method raises InputError for what is missing or malformed."""

    def read_items(self, config: Config) -> pa.Table:
        """All items (`columns.ITEMS`) in the order of their file."""

    def interaction_files(self, config: Config) -> list[str]:
        """Files of interactions, in an order that breaks ties of time; each is read by one worker."""

    def read_interactions(self, path: str, config: Config, /) -> Iterator[pa.Table]:
        """Chunks of one file (`columns.INTERACTIONS`)."""


_SOURCES: dict[str, Source] = {"amazon": amazon, "d3": d3, "demo": demo, "movielens": movielens, "table": table}


def source_of(config: Config) -> Source:
    """The reader that `data.source` names."""
    return _SOURCES[config.data.source]

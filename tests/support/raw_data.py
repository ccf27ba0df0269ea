"""The whole content of raw files, by the source of a configuration."""

import pyarrow as pa

from l2d_ray.config import Config
from l2d_ray.data.sources import source_of


def items_of(config: Config) -> pa.Table:
    """Read all items."""
    return pa.concat_tables(list(source_of(config).read_items(config)))


def interactions_of(config: Config) -> pa.Table:
    """Read the interactions of all files, in the order of the files."""
    source = source_of(config)
    files = source.interaction_files(config)
    return pa.concat_tables([chunk for path in files for chunk in source.read_interactions(path, config)])

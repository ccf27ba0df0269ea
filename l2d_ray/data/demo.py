"""The embedded default: MovieLens-100k, downloaded and cached by whoever reads it, so that every node has its copy."""

from collections.abc import Iterator

import pyarrow as pa

from l2d_ray.config import Config
from l2d_ray.data import movielens
from l2d_ray.data.files import file_name
from l2d_ray.downloads import movielens_100k


def read_items(config: Config) -> pa.Table:
    """The 1,682 movies."""
    return movielens.read_items(_located(config))


def interaction_files(config: Config) -> list[str]:
    """The one file of ratings, as this machine's cache holds it."""
    return movielens.interaction_files(_located(config))


def read_interactions(path: str, config: Config) -> Iterator[pa.Table]:
    """The 100,000 ratings, from the cache of the machine that calls."""
    return movielens.read_interactions(str(movielens_100k() / file_name(path)), config)


def _located(config: Config) -> Config:
    return config.replace({"data.interactions": str(movielens_100k()), "data.items": None})

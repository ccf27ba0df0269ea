"""The embedded default: MovieLens-100k, downloaded and cached on every node that reads it."""

from collections.abc import Iterator

import pyarrow as pa

from l2d_ray.config import Config
from l2d_ray.data import movielens
from l2d_ray.data.files import file_name
from l2d_ray.downloads import movielens_100k

NEEDS = ()


def read_items(config: Config) -> Iterator[pa.Table]:
    """Yield the 1,682 movies."""
    return movielens.read_items(_located(config))


def interaction_files(config: Config) -> list[str]:
    """Return the one file of ratings in this machine's cache."""
    return movielens.interaction_files(_located(config))


def read_interactions(path: str, config: Config) -> Iterator[pa.Table]:
    """Yield the 100,000 ratings, from the cache of the machine that calls."""
    return movielens.read_interactions(str(movielens_100k() / file_name(path)), config)


def _located(config: Config) -> Config:
    return config.replace({"data.interactions": str(movielens_100k()), "data.items": None})

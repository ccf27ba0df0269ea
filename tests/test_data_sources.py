from typing import get_args

import pytest

from l2d_ray.config import Config, DataConfig
from l2d_ray.data.catalogue import read_catalogue
from l2d_ray.data.sources import source_of

SOURCES = get_args(DataConfig.model_fields["source"].annotation)


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_of_the_configuration_has_a_reader(name: str) -> None:
    source = source_of(Config(data=DataConfig(source=name, interactions="log", items="items")))
    assert source.__name__.endswith("movielens" if name == "movielens" else name)  # type: ignore[attr-defined]


@pytest.mark.embedded
def test_the_demo_is_movielens_100k() -> None:
    config = Config()
    source = source_of(config)
    (path,) = source.interaction_files(config)
    assert sum(len(chunk) for chunk in source.read_interactions(path, config)) == 100_000
    catalogue = read_catalogue(config)
    assert len(catalogue) == 1_682
    assert catalogue.titles[0].as_py() == "Toy Story (1995)"

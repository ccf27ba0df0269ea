"""The item means of an index: rows and titles, in files for the aggregation `posterior`."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from support.small_endpoint import write_endpoint
from support.small_memory import build, write_memory
from support.small_posterior import fit

from l2d_ray.config import Config
from l2d_ray.core.posterior import Parameters
from l2d_ray.core.query import Query
from l2d_ray.core.titles import Standardisation
from l2d_ray.data.dataset import Dataset, write_version
from l2d_ray.index.manifest import PosteriorRecord
from l2d_ray.index.sharding import ShardedIndex
from l2d_ray.memory.store import MemoryStore
from l2d_ray.schema import ITEMS
from l2d_ray.stages.index_plan import plan_index
from l2d_ray.stages.item_means import IndexMeans
from l2d_ray.workspace import Workspace

ITEMS_OF_MEMORY = 40


@pytest.mark.parametrize("space", ["none", "centre", "whiten-within"])
def test_an_item_without_rows_has_the_mean_that_its_title_predicts(tmp_path: Path, space: str) -> None:
    """Items with few rows move towards it where the space has a posterior mean; others keep the means of their rows."""
    plan, _ = build(write_memory(tmp_path), space=space)
    titles = np.random.default_rng(0).standard_normal((ITEMS_OF_MEMORY + 5, 6)).astype(np.float32)
    means = IndexMeans.open(plan, titles)
    index = ShardedIndex.open(plan.workspace, plan.manifest)
    cold = 0
    for number, shard in enumerate(index.shards):
        items, of_rows, of_titles = means.shard(number)
        has_rows = np.isin(items, shard.items_I)
        np.testing.assert_allclose(of_rows[has_rows], shard.centroids.vectors_ND - means.offset_D, atol=1e-3)
        assert not of_rows[~has_rows].any()
        assert of_titles[~has_rows].all()
        assert of_titles[has_rows].any() == (space == "whiten-within")
        cold += int((~has_rows).sum())
    assert cold == 5


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return write_endpoint(tmp_path_factory.mktemp("endpoint"))


def test_the_files_have_the_means_with_the_weight_of_titles(endpoint: Config) -> None:
    plan = plan_index(endpoint)
    record = PosteriorRecord.read(plan.workspace, plan.posterior)
    assert record.parameters.title != Parameters().title
    index = ShardedIndex.open(plan.workspace, plan.manifest)
    for number, file in enumerate(record.means):
        scorer = index.shards[number].scorer
        assert scorer is not None
        assert file.path.startswith(f"{plan.base}/means/")
        assert scorer.means_VD.shape == (scorer.items_V.size, plan.dimension)


def test_an_item_that_is_added_is_recommended_by_its_title(endpoint: Config, tmp_path: Path) -> None:
    """An item with the title of another one is about as likely as that one would be without its rows."""
    shutil.copytree(endpoint.workspace, tmp_path, dirs_exist_ok=True)
    config = endpoint.replace({"workspace": str(tmp_path)})
    workspace = Workspace.open(str(tmp_path))
    dataset = Dataset.open(workspace)
    states = {path: path.read_bytes() for path in tmp_path.glob("recommenders/titles/*")}
    new = pa.table([[30, 31], ["new", "other"], ["Title 3 of the year", "Zebra"]], schema=ITEMS)
    grown = write_version(dataset, new, 0, [], {}, 0)
    assert (grown.num_users, len(grown.generations), len(grown.items())) == (dataset.num_users, 1, 32)
    store = MemoryStore(workspace)
    store.keep_items(grown.digest, grown.items())
    store.take_snapshot(store.units(), grown.digest, 1.0)
    config = config.replace({"index.snapshot": 2})
    build(workspace, snapshot=2)
    record = fit(config)
    assert (record.items, record.samples) == (32, 40)
    assert len({*tmp_path.glob("recommenders/titles/*")} - states.keys()) == 1  # the old states are not computed again
    index = ShardedIndex.open(workspace, plan_index(config).manifest)
    state = np.random.default_rng(1).standard_normal((1, index.space.mean_D.size)).astype(np.float32)  # type: ignore[union-attr]
    (found,) = index.recommend(state, [Query([1, 2], 32, aggregation="posterior")])
    assert {30, 31} <= set(found.items_I.tolist())
    assert np.isfinite(found.scores_I).all()
    assert np.exp(found.scores_I).sum() == pytest.approx(1)


def test_features_of_equal_titles_are_equal() -> None:
    states = np.array([[1.0, 5.0], [1.0, 7.0], [1.0, 5.0]], np.float32)
    np.testing.assert_allclose(Standardisation.of(states)(states)[:, 0], 0)
    features = Standardisation.of(states)(states)
    np.testing.assert_array_equal(features[0], features[2])

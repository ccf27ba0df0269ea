"""The newest index of an endpoint's workspace, and which of them it follows, without Ray."""

from pathlib import Path

import pytest
from support.small_endpoint import grow_endpoint, write_endpoint
from support.small_memory import build
from support.small_posterior import fit
from support.small_workspace import build_units, write_dataset

from l2d_ray.config import Config
from l2d_ray.distributed.serving.deployments import new_release_file
from l2d_ray.errors import InputError
from l2d_ray.index.manifest import IndexManifest, PosteriorRecord, posterior_path
from l2d_ray.memory.store import MemoryStore
from l2d_ray.serve.following import NewestIndex
from l2d_ray.stages.settings import record_index
from l2d_ray.workspace import Workspace


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return write_endpoint(tmp_path)


def test_each_newer_index_is_offered_once(config: Config) -> None:
    file = new_release_file(config)
    newest = NewestIndex(file, config)
    assert newest.take() is None
    for snapshot in (2, 3):
        grow_endpoint(config)
        release = newest.take()
        assert release is not None
        assert release.open().manifest.snapshot == snapshot
        file.write([release])
        assert newest.take() is None
    newest.offer_again()
    assert newest.take() is None  # it is served
    file.write([file.first])
    assert newest.take() is None  # rolled back
    newest.offer_again()
    assert newest.take() == release


def test_an_interrupted_promotion_is_taken_up(config: Config) -> None:
    file = new_release_file(config)
    grow_endpoint(config)
    newer = new_release_file(config).first
    assert NewestIndex(file, config).take() == newer
    assert NewestIndex(file, config).take() is None
    file.write([file.first, newer])
    assert NewestIndex(file, config).take() == newer


def test_an_index_that_is_built_while_the_endpoint_starts_or_its_follower_is_replaced_is_offered(
    config: Config,
) -> None:
    file = new_release_file(config)
    for snapshot in (2, 3):
        grow_endpoint(config)
        release = NewestIndex(file, config).take()
        assert release is not None
        assert release.open().manifest.snapshot == snapshot
        file.write([release])
    file.write([file.first])  # rolled back
    newest = NewestIndex(file, config)
    assert newest.take() is None
    newest.offer_again()  # its promotion failed, and the follower is replaced
    assert NewestIndex(file, config).take() == release


def test_an_index_that_grew_has_the_parameters_of_the_older_one(config: Config) -> None:
    workspace, before = Workspace.open(config.workspace), new_release_file(config).first
    grow_endpoint(config)
    after = new_release_file(config).first
    older, newer = (PosteriorRecord.read(workspace, posterior_path(one.index)) for one in (before, after))
    assert IndexManifest.read(workspace, after.index).fitted.older == before.index
    assert (newer.parameters, newer.nats, newer.items) == (older.parameters, older.nats, older.items + 1)


def test_an_index_of_another_dataset_is_left_out(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    newest, workspace = NewestIndex(new_release_file(config), config), Workspace.open(config.workspace)
    dataset, store = write_dataset(Path(config.workspace), users=30, seed=5), MemoryStore(workspace)
    names = [record.unit for record in build_units(config)]
    store.keep_items(dataset.digest, dataset.items())
    store.take_snapshot(names, dataset.digest, 1.0)
    build(workspace)
    fit(config)
    record_index(config, 2)
    assert newest.take() is None
    assert "the endpoint does not follow it: its dataset does not continue the served one" in caplog.text


def test_an_index_of_another_model_is_left_out(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = write_endpoint(tmp_path / "other", **{"model.num_layers": 1})
    newest = NewestIndex(new_release_file(config), other)
    newest.offer_again()
    assert newest.take() is None
    assert "the endpoint does not follow it: its memory was made with another num_layers (2, now 1)" in caplog.text


def test_an_endpoint_of_one_snapshot_follows_nothing(config: Config) -> None:
    with pytest.raises(InputError, match=r"index\.snapshot=1: .* serve\.follow=true serves the newest; leave one"):
        new_release_file(config.replace({"serve.follow": True, "index.snapshot": 1}))

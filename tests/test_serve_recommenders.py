"""Recommenders next to L2D: which may be served, and that a release keeps to the weights that it was planned with."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from support.small_endpoint import train_recommender, write_endpoint
from support.small_workspace import ITEM_COUNT, write_dataset

from l2d_ray.config import Config
from l2d_ray.core.query import Query
from l2d_ray.errors import InputError
from l2d_ray.recommenders.popularity_window import PopularityWindow
from l2d_ray.serve.recommenders import runs_model
from l2d_ray.serve.releases import Release

NAMES = ["sasrec", "transitions", "popularity-window", "ease-100", "title-knn"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Write a workspace in which SASRec is trained."""
    config = write_endpoint(tmp_path_factory.mktemp("prepared"))
    train_recommender(config)
    return config


@pytest.fixture
def config(prepared: Config, tmp_path: Path) -> Config:
    """Copy that workspace for one test."""
    shutil.copytree(prepared.workspace, tmp_path, dirs_exist_ok=True)
    return prepared.replace({"workspace": str(tmp_path), "model.name": str(tmp_path / "model")})


def test_a_release_makes_its_recommenders_with_the_weights_that_it_records(prepared: Config) -> None:
    release = Release.plan(prepared, NAMES)
    assert list(release.recommenders) == NAMES
    assert [bool(weights) for weights in release.recommenders.values()] == [True, False, False, False, False]
    for name, recommender in release.make_recommenders().items():
        known, unknown = recommender.recommend([Query.after([3, 7], 5), Query.after(["A film of tomorrow"], 5)])
        assert len(known) == 5
        assert not {3, 7} & {*known.items_I.tolist()}
        assert len(unknown) == (0 if name == "title-knn" else 5)


def test_the_names_come_from_the_configuration_each_once(prepared: Config) -> None:
    config = prepared.replace({"serve.recommender": ["transitions", "sasrec", "transitions"]})
    assert list(Release.plan(config).recommenders) == ["transitions", "sasrec"]


def test_the_version_is_that_of_l2d_alone_unless_there_are_others(prepared: Config) -> None:
    alone, counts, trained = (Release.plan(prepared, names) for names in ([], ["transitions"], ["sasrec"]))
    assert alone.version == alone.model_copy(update={"recommenders": {}}).version
    assert len({alone.version, counts.version, trained.version}) == 3


def test_a_model_is_needed_only_by_those_that_read_titles(prepared: Config) -> None:
    assert [runs_model([name], prepared) for name in NAMES] == [False, False, False, False, True]


def test_without_a_model_recommenders_run_on_a_cpu(prepared: Config) -> None:
    """A machine without a GPU could not place SASRec on it."""
    release = Release.plan(prepared.replace({"workers.gpus": 1.0}), ["sasrec"])
    assert len(release.make_recommenders()["sasrec"].recommend([Query.after([3], 5)])[0]) == 5


def test_a_request_is_made_after_all_of_the_data(prepared: Config) -> None:
    """The window ends there, not at the clock's time: data of last year would leave it empty."""
    recommender = Release.plan(prepared, ["popularity-window"]).make_recommenders()["popularity-window"]
    assert isinstance(recommender, PopularityWindow)
    newest = int(recommender.events.timestamps[-1])
    now, later = recommender.recommend([Query.after([3], 5), Query.after([3], 5, timestamp=newest + 1)])
    np.testing.assert_array_equal(now.scores_I, later.scores_I)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sasrek", "serve.recommender='sasrek': unknown recommender; did you mean sasrec?"),
        ("l2d", "serve.recommender='l2d': L2D is served in any case; leave it out"),
        ("l2d-local-none", "serve.recommender='l2d-local-none': L2D is served in any case; leave it out"),
        ("gru4rec", "WS/recommenders/gru4rec/training.json: not found; run jobs/train.py recommender=gru4rec first"),
        (
            "gpt4rec-4",
            "serve.recommender='gpt4rec-4': cannot be served, because it writes text, which takes seconds; leave it"
            " out",
        ),
        (
            "file:WS/dataset/items.parquet",
            "serve.recommender='file:WS/dataset/items.parquet': cannot be served, because it has lists for the samples"
            " of an evaluation only; leave it out",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(prepared: Config, name: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        Release.plan(prepared, [name.replace("WS", prepared.workspace)])
    assert str(refused.value).replace(prepared.workspace, "WS") == message


def test_recommenders_of_a_newer_dataset_are_refused(config: Config) -> None:
    """Its items may have other indices than those of the memory."""
    planned = Release.plan(config, ["transitions"])
    write_dataset(Path(config.workspace), users=ITEM_COUNT, seed=3)
    with pytest.raises(
        InputError, match=r"/dataset: is not the dataset of the memory, so transitions cannot be served"
    ):
        Release.plan(config, ["transitions"])
    assert planned.make_recommenders() == {}
    assert Release.plan(config).recommenders == {}


def test_weights_that_were_trained_again_are_left_out_until_a_promotion(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    planned = Release.plan(config, ["sasrec", "transitions"])
    shutil.rmtree(Path(config.workspace) / "recommenders")
    assert planned.make_recommenders().keys() == {"transitions"}
    train_recommender(config, **{"train.seed": 1})
    assert planned.make_recommenders().keys() == {"transitions"}
    assert caplog.messages == ["sasrec: replaced since this release was first served; run jobs/promote.py"] * 2
    promoted = Release.plan(config, planned.recommenders)
    assert promoted.version != planned.version
    assert promoted.make_recommenders().keys() == {"sasrec", "transitions"}


def test_damaged_weights_are_named(config: Config) -> None:
    planned = Release.plan(config, ["sasrec"])
    (file,) = (Path(config.workspace) / "recommenders/sasrec").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=rf"{file}: its checksum is not that of training.json; delete"):
        planned.make_recommenders()

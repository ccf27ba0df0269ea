"""Fusions: the fit of their weights, their names and records, and their way through evaluation, serving and Python."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize
from support.evaluations import evaluate
from support.small_endpoint import train_recommender, write_endpoint
from support.small_workspace import ITEM_COUNT

import l2d_ray
from l2d_ray.config import Config
from l2d_ray.core.fusion import FusionSamples, FusionWeights
from l2d_ray.core.query import Query
from l2d_ray.data.dataset import Dataset
from l2d_ray.errors import InputError
from l2d_ray.recommenders.contract import IndexKey, Need
from l2d_ray.recommenders.fused import Part, record_path
from l2d_ray.recommenders.registry import find
from l2d_ray.recommenders.resources import Resources
from l2d_ray.serve.releases import Release
from l2d_ray.stages.comparison import document
from l2d_ray.stages.evaluation import plan_evaluation
from l2d_ray.stages.findings import Report
from l2d_ray.stages.fusion import fit_fusions
from l2d_ray.stages.index_plan import plan_index
from l2d_ray.stages.reports import plot, png
from l2d_ray.workspace import Workspace

ITEMS = 40
NAMES = ["fused", "fused:l2d+transitions", "fused:transitions+popularity-window"]


def samples(count: int, weights: FusionWeights, seed: int = 0) -> FusionSamples:
    """Return samples whose targets a fusion with these weights drew."""
    random = np.random.default_rng(seed)
    logs_KUI = random.normal(size=(len(weights.parts_K), count, ITEMS)) * [[[1.0]], [[5.0]]]
    rows, items = np.repeat(np.arange(count), 3), random.integers(0, ITEMS, 3 * count)
    seen = tuple(np.unique([rows, items], axis=1))
    probabilities_UI = np.exp(weights.log_probabilities(logs_KUI, seen))
    targets = [random.choice(ITEMS, p=p_I / p_I.sum()) for p_I in probabilities_UI]
    return FusionSamples(logs_KUI, seen, np.array(targets, np.int64))


def test_the_fit_finds_the_weights_that_the_targets_were_drawn_with() -> None:
    drawn = FusionWeights((1.4, 0.2), -1.5)
    found = samples(3000, drawn).fit()
    np.testing.assert_allclose(found.parts_K, drawn.parts_K, rtol=0.1)
    assert found.log_repeat == pytest.approx(drawn.log_repeat, abs=0.25)
    assert found == samples(3000, drawn).fit()


def test_a_part_that_says_nothing_gets_no_weight_and_none_is_negative() -> None:
    assert samples(2000, FusionWeights((1.0, 0.0))).fit().parts_K[1] < 0.02
    backwards = samples(2000, FusionWeights((1.0, -0.3))).fit()
    assert backwards.parts_K[1] == 0


def test_the_gradient_is_that_of_the_loss() -> None:
    scores, point = samples(50, FusionWeights((1.0, 0.3), -1.0)), np.array([0.7, 0.4, -0.5])
    gradient = optimize.approx_fprime(point, lambda point: scores._loss(point)[0], 1e-6)
    np.testing.assert_allclose(scores._loss(point)[1], gradient, atol=1e-4)


def test_few_samples_move_the_weights_a_little_and_none_do_not() -> None:
    assert samples(0, FusionWeights((1.0, 1.0))).fit() == FusionWeights((1.0, 1.0), 0.0)
    one = samples(1, FusionWeights((3.0, 0.0)))
    moved = np.array(one.fit().parts_K) - 1
    assert 0 < np.abs(moved).max() < 2


def test_probabilities_add_up_and_do_not_depend_on_other_samples() -> None:
    scores, weights = samples(9, FusionWeights((1.0, 1.0))), FusionWeights((0.3, 1.7), -2.0)
    whole = weights.log_probabilities(scores.logs_KUI, scores.seen)
    np.testing.assert_allclose(np.exp(whole).sum(axis=1), 1)
    for user in range(9):
        rows = scores.seen[0] == user
        seen = scores.seen[0][rows] * 0, scores.seen[1][rows]
        alone = weights.log_probabilities(scores.logs_KUI[:, user : user + 1], seen)
        np.testing.assert_array_equal(alone[0], whole[user])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fused:sasrec", "unknown recommender; write fused, or fused:<recommender>+<recommender>, for example fused"),
        ("fused:sasrek+ease", "fused='sasrek': unknown recommender; did you mean sasrec?"),
        ("fused:d3+ease", "fused='d3': has no scores of the whole catalogue; leave it out"),
        ("fused:fused+ease", "fused='fused': has no scores of the whole catalogue; leave it out"),
    ],
)
def test_what_cannot_be_fused_is_refused_by_name(name: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        find(name, Config(), "evaluate.recommenders")
    assert message in str(refused.value)


def test_a_fusion_needs_what_its_parts_need() -> None:
    plain, two_seeds = (find(name, Config(), "x") for name in ("fused", "fused:sasrec+sasrec-seed1"))
    assert [part.name for part in plain.options.parts] == ["l2d", "sasrec"]
    assert plain.needs == {Need.INDEX, Need.ENCODER, Need.TRAINED}
    assert plain.options.fitted == plain.options.indexes == [IndexKey("whiten-within")]
    assert (two_seeds.needs, two_seeds.options.indexes) == ({Need.TRAINED}, [])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Write a workspace in which SASRec is trained."""
    folder, names = tmp_path_factory.mktemp("fused"), json.dumps([*NAMES, "l2d", "transitions"])
    config = write_endpoint(folder, **{"evaluate.recommenders": names, "evaluate.fractions": "[]"})
    train_recommender(config)
    return config


@pytest.fixture(scope="module")
def report(prepared: Config) -> Report:
    """Evaluate all fusions, which fits them."""
    return evaluate(plan_evaluation(prepared), indexes_of(prepared))


@pytest.fixture
def config(prepared: Config, report: Report, tmp_path: Path) -> Config:
    """Copy that workspace, with the weights of its fusions, for one test."""
    shutil.copytree(prepared.workspace, tmp_path, dirs_exist_ok=True)
    return prepared.replace({"workspace": str(tmp_path), "model.name": str(tmp_path / "model")})


def indexes_of(config: Config) -> dict[IndexKey, str]:
    return {IndexKey(config.index.space): plan_index(config).manifest}


def test_the_report_has_the_weights_of_each_fusion(report: Report) -> None:
    assert report.fusions.keys() == {*NAMES}
    record = report.fusions["fused:l2d+transitions"]
    assert ([*record.parts], record.samples) == (["l2d", "transitions"], 40)
    assert record.nats is not None
    assert 2 < record.nats < np.log(ITEM_COUNT) + 0.5  # the histories are random
    assert report.to_json()["fusions"]["fused"]["parts"].keys() == {"l2d", "sasrec"}
    allowed = {one.recommender: one for one in report.allowances}["fused"]
    assert (allowed.configurations, allowed.settings, allowed.samples) == (1, ["weights"], 40)
    assert report.costs["fused"].bytes > report.costs["l2d"].bytes
    text = document(report, "figure.png")
    assert "\n| fused:l2d+transitions | l2d " in text.partition("## Fusions")[2]


def test_probabilities_are_calibrated_against_what_came_next(report: Report) -> None:
    assert report.calibrations.keys() == {*NAMES, "l2d"}
    found = report.to_json()["calibration"]["l2d"]
    assert 700 < sum(one["predictions"] for one in found["bins"]) <= 40 * 20  # seen items leave some lists shorter
    recall = next(row for row in report.results if row.recommender == "l2d").metrics.means["recall@20"]
    hits = sum(one["observed"] * one["predictions"] for one in found["bins"])
    assert hits / 40 == pytest.approx(recall, abs=1e-4)
    assert "| l2d |" in document(report, "figure.png").partition("## Calibration")[2]


def test_the_plots_have_the_reliability_of_each(report: Report) -> None:
    *_, reliability = plot(report).axes
    assert [line.get_label().partition(",")[0] for line in reliability.lines] == [*report.calibrations, "perfect"]
    assert png(plot(report)).startswith(b"\x89PNG")


def test_a_fusion_adds_the_log_probabilities_of_its_parts(prepared: Config, report: Report) -> None:
    resources = Resources(prepared, set(Need), indexes_of(prepared))
    named = find("fused:l2d+transitions", prepared, "x")
    fused, l2d = resources.recommender(named), resources.recommender(find("l2d", prepared, "x"))
    assert fused.parts[0].recommender is l2d  # which therefore runs once for both
    query = Query.after([3, 4, "A title that nobody knows"], ITEM_COUNT, exclude_seen=False)
    record, expected = report.fusions[named.name], np.zeros(ITEM_COUNT)
    for part, weight in zip(named.options.parts, record.parts.values(), strict=True):
        (found,) = resources.recommender(part).recommend([query])
        scores_I = found.scores_I if part.name == "l2d" else np.log(found.scores_I)
        logs_I = np.full(ITEM_COUNT, scores_I.min())
        logs_I[found.items_I] = scores_I
        expected += weight * logs_I
    expected[[3, 4]] += record.log_repeat
    expected -= np.log(np.exp(expected).sum())
    (found,) = fused.recommend([query])
    np.testing.assert_allclose(found.scores_I, np.sort(expected)[::-1], rtol=1e-4)
    np.testing.assert_allclose(expected[found.items_I], found.scores_I, rtol=1e-4)


def test_an_item_that_a_part_does_not_list_has_its_least_score(prepared: Config) -> None:
    resources, named = Resources(prepared, set(Need), {}), find("title-knn", prepared, "x")
    part = Part(named, resources.recommender(named), ITEM_COUNT + 1)
    logs_UI, _ = part.run([Query.after([3], 2, deny=[5]), Query.after(["A title that nobody knows"], 2)])
    assert logs_UI[0, ITEM_COUNT] == logs_UI[0, :ITEM_COUNT].min() < logs_UI[0, 5]
    assert not logs_UI[1].any()


def test_weights_are_fitted_anew_only_if_a_part_has_changed(config: Config, report: Report) -> None:
    named, dataset = find("fused", config, "x"), Dataset.open(Workspace.open(config.workspace))
    assert fit_fusions(config, [named], indexes_of(config)) == [report.fusions["fused"]]
    before = record_path(named.options, dataset, indexes_of(config))
    shutil.rmtree(Path(config.workspace) / "recommenders/sasrec")
    train_recommender(config, **{"train.seed": 1})
    assert record_path(named.options, dataset, indexes_of(config)) != before
    message = (
        "has no weights for its parts as they are; run jobs/evaluate.py evaluate.recommenders=fused:l2d.sasrec first"
    )
    with pytest.raises(InputError, match=message):
        Release.plan(config, ["fused"])
    fit_fusions(config, [named], indexes_of(config))
    assert Release.plan(config, ["fused"]).log_probabilities == ["fused"]


def test_a_fusion_is_served_with_the_index_of_the_endpoint(prepared: Config, report: Report) -> None:
    release = Release.plan(prepared, ["fused", "fused:transitions+popularity-window"])
    query = Query.after([3, 7], 5)
    resources = Resources(prepared, set(Need), indexes_of(prepared))
    for name, recommender in release.make_recommenders().items():
        (found,) = recommender.recommend([query])
        (expected,) = resources.recommender(find(name, prepared, "x")).recommend([query])
        np.testing.assert_array_equal(found.items_I, expected.items_I)
    with pytest.raises(InputError, match="cannot be served, because it searches another index than the endpoint"):
        Release.plan(prepared, ["fused:l2d-global-none+transitions"])


def test_a_fusion_is_loaded_in_python(prepared: Config, report: Report) -> None:
    found = l2d_ray.load(prepared.workspace, recommender="fused").recommend(
        ["i3", "i7"], k=ITEM_COUNT, exclude_seen=False
    )
    assert np.exp([one.score for one in found]).sum() == pytest.approx(1)

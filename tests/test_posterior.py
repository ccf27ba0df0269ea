"""The aggregation `posterior`: against its formula, over shards, and from files with fitted parameters."""

import pickle
import shutil
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.l2d_definitions import log_posterior, prior
from support.small_endpoint import write_endpoint
from support.small_posterior import fit
from support.small_workspace import ITEM_COUNT

from l2d_ray.config import Config
from l2d_ray.core.arrays import Float64
from l2d_ray.core.calibration import ValidationScores
from l2d_ray.core.decoding import ScoredItems
from l2d_ray.core.posterior import FLOOR, ItemScorer, Parameters
from l2d_ray.core.query import Query
from l2d_ray.core.samples import item_shards
from l2d_ray.core.transition_counts import TransitionCounts
from l2d_ray.data.dataset import Dataset
from l2d_ray.data.samples import TrainingInteractions, training_interactions
from l2d_ray.errors import InputError
from l2d_ray.index import aggregations
from l2d_ray.index.exchange import drive, run
from l2d_ray.index.manifest import PosteriorRecord
from l2d_ray.index.sharding import IndexReader, ShardedIndex
from l2d_ray.serve.releases import Release
from l2d_ray.stages.index_plan import dataset_of, plan_index
from l2d_ray.stages.item_means import IndexMeans
from l2d_ray.stages.posterior import compute_titles, encode, fit_posterior, validation_samples
from l2d_ray.workspace import Workspace

DIMENSION = 4


class Case:
    """Random items, of which a third has no rows, training histories, and parameters."""

    def __init__(self, seed: int, num_items: int) -> None:
        random = np.random.default_rng(seed)
        self.num_items = num_items
        self.histories = [random.integers(0, num_items, random.integers(2, 20)).tolist() for _ in range(12)]
        self.means_ID = random.standard_normal((num_items, DIMENSION)).astype(np.float32)
        self.means_ID[random.random(num_items) < 1 / 3] = 0
        self.means_ID[-1] = self.means_ID[0]  # ties
        values = random.uniform([0.01, 0.5, 0.1, 0.1, 0.5, 0.01, 0.1, 0.1], [2, 2, 0.99, 1, 50, 2, 2, 5])
        self.parameters = Parameters(*values.tolist())

    @property
    def unseen(self) -> list[int]:
        """The items that are no training target."""
        seen = {item for history in self.histories for item in history[1:]}
        return [item for item in range(self.num_items) if item not in seen]

    def counts(self, targets_V: NDArray[np.int64]) -> TransitionCounts:
        offsets = np.cumsum([0, *map(len, self.histories)])
        is_target = np.ones(offsets[-1], np.bool_)
        is_target[offsets[:-1]] = False
        items = np.concatenate(self.histories).astype(np.int32)
        training = TrainingInteractions(items, np.zeros(items.size, np.int64), offsets, is_target)
        return TransitionCounts.count([training], self.num_items, targets_V)

    def shards(self, count: int) -> list[SimpleNamespace]:
        """Return shards with nothing but their scorer."""
        shard_of_V = item_shards(np.arange(self.num_items, dtype=np.int32), count)
        shards = []
        for shard in range(count):
            items_V = np.flatnonzero(shard_of_V == shard)
            counts, means_VD = self.counts(items_V), self.means_ID[items_V]
            transitions = counts.weigh(self.parameters.lag_decay, FLOOR)
            unseen_V = counts.samples_V == 0
            scorer = ItemScorer(items_V, means_VD, np.zeros(DIMENSION), unseen_V, transitions, self.parameters)
            shards.append(SimpleNamespace(scorer=scorer))
        return shards

    def recommend(self, count: int, states_UD: Float64, queries: Sequence[Query]) -> list[ScoredItems]:
        """Recommend over shards that only pickled requests reach."""
        shards = self.shards(count)
        exchange = aggregations.recommend(states_UD, queries)
        return drive(exchange, lambda request: pickle.loads(pickle.dumps(request)).answer(shards))


def queries_of(case: Case) -> list[Query]:
    last = case.num_items - 1
    options = [
        {"history": [0]},
        {"history": [last, 0, "unknown", last], "k": case.num_items + 5},
        {"history": ["unknown", "titles only"], "k": 3},
        {"history": [*range(case.num_items)] * 2, "exclude": np.array([0, 10**6])},
        {"history": [0], "allow": np.array([0, last])},
    ]
    return [Query(aggregation="posterior", **one) for one in options]


@given(st.integers(0, 10**6), st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_one_two_and_seven_shards_recommend_what_the_formula_says(seed: int, num_items: int) -> None:
    case = Case(seed, num_items)
    queries = queries_of(case)
    states = np.random.default_rng(seed).standard_normal((len(queries), DIMENSION))
    whole = case.recommend(1, states, queries)
    for found, state, query in zip(whole, states, queries, strict=True):
        prior_I = prior(case.histories, num_items, query.history, case.parameters)
        expected = log_posterior(case.means_ID, state, prior_I, case.unseen, query.history, case.parameters)
        assert np.exp(expected).sum() == pytest.approx(1)
        everything = ScoredItems(np.arange(num_items), expected).permitted(query.exclude, query.allow)
        assert len(found) == min(query.k, len(everything))
        np.testing.assert_allclose(found.scores_I, expected[found.items_I], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.scores_I, np.sort(everything.scores_I)[::-1][: query.k], rtol=1e-4, atol=1e-5)
    for shards in (2, 7):
        for found, expected in zip(case.recommend(shards, states, queries), whole, strict=True):
            np.testing.assert_array_equal(found.items_I, expected.items_I)
            np.testing.assert_allclose(
                found.scores_I, expected.scores_I, rtol=1e-12, atol=1e-12
            )  # Z is summed in another order


@pytest.mark.parametrize("dimension", [5, 576])
def test_the_score_of_an_item_does_not_depend_on_the_other_items(dimension: int) -> None:
    """Not even in its last bit, so that items are ordered alike under any sharding."""
    random = np.random.default_rng(3)
    means_ID, state = random.standard_normal((211, dimension)).astype(np.float32), random.standard_normal(dimension)

    def scores(items: slice) -> Float64:
        nothing, means_VD = np.arange(0), means_ID[items].copy()
        scorer = ItemScorer(nothing, means_VD, np.zeros(dimension), nothing > 0, None, Parameters())
        return scorer.state_scores(state)

    for items in (slice(1, None), slice(7, 20), slice(210, 211), slice(None, None, 3)):
        np.testing.assert_array_equal(scores(items), scores(slice(None))[items])


def test_an_index_without_parameters_refuses_the_aggregation() -> None:
    with pytest.raises(InputError, match="aggregation='posterior': the index has no parameters for it; run jobs/build"):
        run(
            aggregations.recommend(np.zeros((1, 4)), [Query([0], aggregation="posterior")]),
            [SimpleNamespace(scorer=None)],
        )


def validation(samples: int, repeats: float = 0.0, title: float = 1.0, unseen: float = 10.0) -> ValidationScores:
    """Return samples that follow the model with other parameters than the defaults."""
    case, random = Case(1, 30), np.random.default_rng(5)
    case.parameters = Parameters(
        tau=0.5, age_decay=0.4, lag_decay=0.5, smoothing=4, repeat=max(repeats, 1e-9), title=title, unseen=unseen
    )
    case.histories = [[item for item in history if item < 20] for history in case.histories]
    histories = [random.integers(0, 20, random.integers(1, 12)) for _ in range(samples)]
    states = 3 * random.standard_normal((samples, DIMENSION))
    titles_ID = random.standard_normal((30, DIMENSION)).astype(np.float32)
    means_ID, targets = case.means_ID + title * titles_ID, []
    for history, state in zip(histories, states, strict=True):
        prior_I = prior(case.histories, 30, history.tolist(), case.parameters)
        p = np.exp(log_posterior(means_ID, state, prior_I, case.unseen, history.tolist(), case.parameters))
        targets.append(random.choice(30, p=p))
    return ValidationScores(
        state_scores_UV=states @ case.means_ID.T - np.vecdot(case.means_ID, case.means_ID) / 2,
        title_scores_UV=states @ titles_ID.T - np.vecdot(case.means_ID, titles_ID),
        title_norms_V=np.vecdot(titles_ID, titles_ID) / 2,
        histories=histories,
        targets_U=np.array(targets, np.int64),
        counts=case.counts(np.arange(30)),
    )


def test_the_fit_finds_the_weight_of_the_state_and_that_nothing_is_repeated() -> None:
    scores = validation(300)
    found = scores.fit()
    assert found == scores.fit()
    assert found.tau == pytest.approx(0.5, rel=0.2)
    assert found.repeat < 0.05
    assert scores.cross_entropy(found) < scores.cross_entropy(Parameters()) - 0.1


def test_the_fit_finds_the_weight_of_titles_and_of_items_without_samples() -> None:
    found = validation(400, title=0.8, unseen=2.0).fit()
    assert found.title == pytest.approx(0.8, rel=0.3)
    assert 1 < found.unseen < 6


def test_the_fit_finds_repetitions() -> None:
    assert validation(200, repeats=2.0).fit().repeat == pytest.approx(2, rel=0.3)


def test_one_sample_moves_the_parameters_a_little_and_none_does_not() -> None:
    assert validation(0).fit() == Parameters()
    ratios = np.array(astuple(validation(1).fit())) / np.array(astuple(Parameters()))
    assert (ratios != 1).any()
    assert ((ratios > 1 / 4) & (ratios < 4)).all()


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, PosteriorRecord]:
    """Return a workspace with an index, and the parameters that were fitted for it."""
    config = write_endpoint(tmp_path_factory.mktemp("fitted"))
    return config, PosteriorRecord.read(Workspace.open(config.workspace), plan_index(config).posterior)


def test_parameters_are_fitted_on_the_validation_samples_and_stored(fitted: tuple[Config, PosteriorRecord]) -> None:
    _, record = fitted
    assert (record.samples, record.items, len(record.transitions)) == (40, ITEM_COUNT, 2)
    assert record.parameters != Parameters()
    assert record.nats is not None
    assert 2 < record.nats < np.log(ITEM_COUNT) + 0.5  # the histories are random
    assert sum(transitions.pairs for transitions in record.transitions) > ITEM_COUNT


def test_a_second_fit_gives_the_same_parameters_and_files(
    fitted: tuple[Config, PosteriorRecord], tmp_path: Path
) -> None:
    config, record = fitted
    shutil.copytree(config.workspace, tmp_path, dirs_exist_ok=True)
    for path in [*tmp_path.rglob("posterior.json"), *tmp_path.glob("index/*/transitions/*")]:
        path.unlink()
    again = fit(config.replace({"workspace": str(tmp_path)}))
    assert (again.parameters, again.nats) == (record.parameters, record.nats)
    digests = [[transitions.file.sha256 for transitions in one.transitions] for one in (again, record)]
    assert digests[0] == digests[1]


def test_an_index_from_files_gives_the_probabilities_of_the_formula(fitted: tuple[Config, PosteriorRecord]) -> None:
    config, record = fitted
    workspace = Workspace.open(config.workspace)
    index = ShardedIndex.open(workspace, plan_index(config).manifest)
    training = training_interactions(Dataset.open(workspace))
    histories = [part.tolist() for part in np.split(training.items, training.offsets[1:-1])]
    plan = plan_index(config)
    means, title = IndexMeans.open(plan, compute_titles(config, plan)), record.parameters.title
    means_ID = np.zeros((ITEM_COUNT, plan.dimension))
    for number, shard in enumerate(index.shards):
        items_V, of_rows_VD, of_titles_VD = means.shard(number)
        means_ID[items_V] = of_rows_VD + title * of_titles_VD
        places = np.searchsorted(items_V, shard.items_I)
        np.testing.assert_allclose(of_rows_VD[places], shard.centroids.vectors_ND, atol=1e-5)
    states = np.random.default_rng(1).standard_normal((2, means_ID.shape[1])).astype(np.float32)
    unseen = np.setdiff1d(np.arange(ITEM_COUNT), training.targets).tolist()
    queries = [Query([3, 4, "unknown"], ITEM_COUNT, aggregation="posterior"), Query([9], 5, aggregation="posterior")]
    for found, state, query in zip(index.recommend(states, queries), states, queries, strict=True):
        prior_I = prior(histories, ITEM_COUNT, query.history, record.parameters)
        expected = log_posterior(
            means_ID, index.space(state[None])[0], prior_I, unseen, query.history, record.parameters
        )
        np.testing.assert_allclose(found.scores_I, np.sort(expected)[::-1][: query.k], rtol=1e-4, atol=1e-5)
    assert np.exp(index.recommend(states, queries)[0].scores_I).sum() == pytest.approx(1)


def test_without_validation_samples_the_parameters_are_the_defaults(
    fitted: tuple[Config, PosteriorRecord], tmp_path: Path
) -> None:
    config, record = fitted
    shutil.copytree(config.workspace, tmp_path, dirs_exist_ok=True)
    plan = plan_index(config.replace({"workspace": str(tmp_path)}))
    (tmp_path / plan.posterior).unlink()
    empty = fit_posterior(config, plan, record.transitions, [], np.empty((0, plan.dimension), np.float32))
    assert (empty.parameters, empty.samples, empty.nats) == (Parameters(), 0, None)


def test_parameters_are_taken_from_another_workspace(fitted: tuple[Config, PosteriorRecord], tmp_path: Path) -> None:
    config, record = fitted
    shutil.copytree(config.workspace, tmp_path / "live")
    live = config.replace({"workspace": str(tmp_path / "live"), "index.parameters_from": config.workspace})
    plan = plan_index(live)
    (tmp_path / "live" / plan.posterior).unlink()
    empty = np.empty((0, plan.dimension), np.float32)
    taken = fit_posterior(live, plan, record.transitions, [], empty)
    assert (taken.parameters, taken.samples, taken.nats) == (record.parameters, record.samples, record.nats)
    for other in (tmp_path / "nothing", tmp_path / "live"):
        (tmp_path / "live" / plan.posterior).unlink(missing_ok=True)
        wrong = plan_index(live.replace({"index.parameters_from": str(other)}))
        with pytest.raises(InputError, match=r"no index with fitted parameters there; run jobs/build_index\.py with"):
            fit_posterior(live, wrong, record.transitions, [], empty)


def test_a_release_changes_with_the_parameters(fitted: tuple[Config, PosteriorRecord], tmp_path: Path) -> None:
    config, _ = fitted
    shutil.copytree(config.workspace, tmp_path, dirs_exist_ok=True)
    config = config.replace({"workspace": str(tmp_path)})
    before = Release.plan(config)
    (tmp_path / plan_index(config).posterior).unlink()
    assert Release.plan(config).version != before.version
    with pytest.raises(InputError, match="the index was replaced after this release was first served"):
        before.open()


def test_a_damaged_file_is_refused_by_name(fitted: tuple[Config, PosteriorRecord], tmp_path: Path) -> None:
    config, record = fitted
    shutil.copytree(config.workspace, tmp_path, dirs_exist_ok=True)
    workspace, manifest = Workspace.open(str(tmp_path)), plan_index(config).manifest
    path = tmp_path / record.transitions[1].file.path
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(InputError, match=f"{path}: its checksum is not the recorded one"):
        ShardedIndex.open(workspace, manifest)
    place = tmp_path / plan_index(config).posterior
    place.unlink()
    record.model_copy(update={"transitions": record.transitions[:1]}).write(workspace, plan_index(config).posterior)
    with pytest.raises(InputError, match=r"posterior.json: lists shards \[0\], expected 2"):
        IndexReader.open(workspace, manifest)


def test_validation_samples_whose_states_are_not_finite_are_left_out(
    fitted: tuple[Config, PosteriorRecord], tmp_path: Path
) -> None:
    config, record = fitted
    shutil.copytree(config.workspace, tmp_path, dirs_exist_ok=True)
    plan = plan_index(config.replace({"workspace": str(tmp_path)}))
    samples = validation_samples(dataset_of(plan))
    states_UD = encode(config, [sample.history for sample in samples])
    found = []
    for number in (None, 7):
        (tmp_path / plan.posterior).unlink()
        if number is not None:
            states_UD[number] = np.nan
        found.append(fit_posterior(config, plan, record.transitions, samples, states_UD))
    assert [one.samples for one in found] == [len(samples), len(samples) - 1]
    assert found[1].parameters.tau == pytest.approx(found[0].parameters.tau, rel=0.5)
    assert np.isfinite(found[1].nats)

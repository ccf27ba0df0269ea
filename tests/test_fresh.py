"""Evaluation with a fresh memory: against an index that is built anew at each moment. Nothing here starts Ray."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.evaluations import evaluate, rank
from support.small_endpoint import write_endpoint
from support.small_memory import build
from support.small_posterior import fit
from support.small_workspace import ITEM_COUNT, config_of, write_dataset

from l2d_ray.config import Config
from l2d_ray.core.query import Query
from l2d_ray.core.transition_counts import TransitionCounts
from l2d_ray.data.dataset import SAMPLE_SPLITS, Dataset
from l2d_ray.data.samples import iter_samples, training_interactions
from l2d_ray.encoding import identify_memory
from l2d_ray.errors import InputError
from l2d_ray.index.manifest import TransitionsRecord
from l2d_ray.index.posterior import shard_items, write_counts
from l2d_ray.index.sharding import ShardedIndex
from l2d_ray.memory.deletions import LiveUnit
from l2d_ray.memory.store import HELD_OUT, MemoryStore
from l2d_ray.recommenders.contract import IndexKey, Need
from l2d_ray.schema import SAMPLES, Split, hidden_states
from l2d_ray.stages.erasure import erase
from l2d_ray.stages.evaluation import choose, final_runs, plan_evaluation
from l2d_ray.stages.extraction import UnitExtractor, held_out_store, plan_held_out
from l2d_ray.stages.fresh import FreshResources
from l2d_ray.stages.index_plan import plan_index
from l2d_ray.stages.indexing import commit
from l2d_ray.stages.posterior import fit_posterior
from l2d_ray.workspace import Workspace

DAY = 86_400
MOMENTS = [day * DAY for day in (3, 4, 12, 21)]
DRIFT = {"index.max_drift": 1e9}


def build_held_out(config: Config) -> None:
    """Compute the rows of validation and test samples, without Ray."""
    extractor = UnitExtractor(config, identify_memory(config))
    for unit in plan_held_out(config, Dataset.open(Workspace.open(config.workspace))):
        extractor.build(unit)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Return a workspace whose users have an item a day, with an index and the rows of all splits."""
    found = write_endpoint(tmp_path_factory.mktemp("fresh"), daily=True, **DRIFT)
    build_held_out(found)
    return found


def with_half_life(config: Config, half_life_days: float | None) -> Config:
    """Return the settings of the same index with a half-life, after it was built."""
    config = config.replace({"index.half_life_days": half_life_days})
    build(Workspace.open(config.workspace), half_life_days=half_life_days)
    fit(config)
    return config


def fresh(config: Config) -> FreshResources:
    key = IndexKey(config.index.space)
    return FreshResources(config, set(Need), {key: plan_index(config).manifest}, [key])


def rebuilt(config: Config, moment: int, folder: Path) -> ShardedIndex:
    """Build an index of the rows that are older than a moment, as a memory grows: map and parameters are kept."""
    shutil.copytree(config.workspace, folder)
    config = config.replace({"workspace": str(folder), "index.snapshot": 2})
    workspace = Workspace.open(str(folder))
    dataset, store, held_out = Dataset.open(workspace), MemoryStore(workspace), held_out_store(workspace)
    units = [(workspace, unit) for unit in store.live_units(store.snapshot(1))]
    units += [(held_out.workspace, LiveUnit(record)) for record in held_out.units().values()]
    with store.write_unit("older", identify_memory(config)) as writer:
        for place, unit in units:
            for rows in unit.read(place):
                older = pa.Table.from_batches([rows]).filter(pa.compute.less(rows["timestamp"], moment))
                writer.write(older.select(SAMPLES.names), hidden_states(older))
    store.take_snapshot(["older"], dataset.digest, 1.0)
    build(workspace, max_drift=1e9, half_life_days=config.index.half_life_days, snapshot=2)
    plan = plan_index(config)
    history = training_interactions(dataset, SAMPLE_SPLITS).before(moment)
    transitions = []
    for shard in range(plan.num_shards):
        targets_V = shard_items(ITEM_COUNT, plan.num_shards, shard)
        counts = TransitionCounts.count([history], ITEM_COUNT, targets_V, config.index.half_life_days)
        file = write_counts(workspace, f"index/counts-{shard}.npz", counts)
        record = TransitionsRecord(shard=shard, pairs=counts.places_P.size, file=file, seconds=0)
        transitions.append(commit(record, workspace, plan.transitions(shard)))
    fit_posterior(config, plan, transitions, [], np.empty((0, plan.dimension), np.float32))
    return ShardedIndex.open(workspace, plan.manifest)


@pytest.mark.parametrize("half_life_days", [None, 3.0])
def test_each_moment_recommends_what_an_index_of_the_older_rows_does(
    config: Config, half_life_days: float | None, tmp_path: Path
) -> None:
    config = with_half_life(config, half_life_days)
    resources, key = fresh(config), IndexKey(config.index.space)
    states = np.random.default_rng(3).standard_normal((6, plan_index(config).dimension)).astype(np.float32)
    histories = [[3], [4, 5, 6], [7] * 12, [1, 2], [9, 8], list(range(15))]
    expected = {moment: rebuilt(config, moment, tmp_path / str(moment)) for moment in MOMENTS}
    for moment in [*MOMENTS, MOMENTS[1]]:  # the last one goes back
        resources.move_to(moment)
        for prior in (0.0, 2.0):
            found, other = resources.index(key, prior), expected[moment].with_prior(prior)
            assert sum(shard.num_rows for shard in found.shards) == sum(shard.num_rows for shard in other.shards)
            for aggregation in ("global", "local", "posterior"):
                queries = [Query(history, 12, aggregation=aggregation, top_m=20) for history in histories]
                pairs = zip(found.recommend(states, queries), other.recommend(states, queries), strict=True)
                for one, expectation in pairs:
                    np.testing.assert_array_equal(one.items_I, expectation.items_I)
                    np.testing.assert_allclose(one.scores_I, expectation.scores_I, rtol=1e-5)


def test_rows_of_other_samples_are_apart_from_the_memory(config: Config) -> None:
    workspace = Workspace.open(config.workspace)
    store = MemoryStore(workspace)
    ids = {
        split: np.concatenate([batch.sample_ids for batch in iter_samples(Dataset.open(workspace), split)])
        for split in (Split.TRAIN, (Split.VALID, Split.TEST))
    }
    memory = [row for rows in store.read(store.snapshot()) for row in rows.column("sample_id").to_pylist()]
    assert sorted(memory) == sorted(ids[Split.TRAIN])
    place = held_out_store(workspace)
    batches = [rows for unit in place.units().values() for rows in LiveUnit(unit).read(place.workspace)]
    others = [row for rows in batches for row in rows.column("sample_id").to_pylist()]
    assert sorted(others) == sorted(ids[Split.VALID, Split.TEST])


def test_counts_of_a_query_are_those_of_older_samples(config: Config) -> None:
    resources = fresh(config)
    dataset = Dataset.open(Workspace.open(config.workspace))
    samples = [sample for batch in iter_samples(dataset, SAMPLE_SPLITS) for sample in batch.records()]
    for moment in MOMENTS:
        resources.move_to(moment)
        older = sorted(sample.target for sample in samples if sample.timestamp < moment)
        assert sorted(resources.training_interactions.targets.tolist()) == older


def test_an_evaluation_asks_each_query_at_its_moment(config: Config) -> None:
    names = '["most-popular","popularity-window-7","transitions","l2d-global","l2d-local","l2d"]'
    settings = {"evaluate.recommenders": names, "evaluate.fractions": [0.5]}
    indexes = {}
    for fraction in (1.0, 0.5):
        build(Workspace.open(config.workspace), sample_fraction=fraction)
        part = config.replace({"index.sample_fraction": fraction})
        fit(part)
        indexes[IndexKey(config.index.space, fraction)] = plan_index(part).manifest
    config = config_of(Path(config.workspace), **DRIFT, **settings)
    stale, new = (
        evaluate(plan_evaluation(config.replace({"evaluate.memory": memory})), indexes) for memory in ("stale", "fresh")
    )
    assert [row.recommender for row in new.results] == [row.recommender for row in stale.results]
    assert [row.metrics.users for row in new.results] == [40] * 6
    assert new.results[0].metrics != stale.results[0].metrics
    samples = [
        one
        for batch in iter_samples(Dataset.open(Workspace.open(config.workspace)), SAMPLE_SPLITS)
        for one in batch.records()
    ]
    hits = 0
    for test in new.plan.test:
        targets = [one.target for one in samples if one.timestamp < test.timestamp]
        counts = np.bincount(targets, minlength=ITEM_COUNT)
        order = [item for item in np.argsort(-counts, kind="stable").tolist() if item not in test.history]
        hits += test.target in [item for item in order if counts[item]][:20]
    assert new.results[0].metrics.means["recall@20"] == pytest.approx(hits / 40)
    assert new.changes == {}


def test_changes_since_an_earlier_report_are_paired(config: Config) -> None:
    workspace, settings = Workspace.open(config.workspace), {"evaluate.recommenders": '["most-popular","transitions"]'}
    plan = plan_evaluation(config_of(Path(config.workspace), **settings))
    found = evaluate(plan, {})
    with workspace.create("reports/before.parquet") as stream:
        pq.write_table(rank(plan, final_runs(plan, choose(plan, [])), {}).drop_columns(["top"]), stream)
    later = plan.config.replace({"evaluate.earlier_report": "before", "evaluate.memory": "fresh"})
    changed = evaluate(plan_evaluation(later), {})
    for row, before in zip(changed.results, found.results, strict=True):
        change = changed.changes[row.recommender]
        for metric, value in change.means.items():
            assert value == pytest.approx(row.metrics.means[metric] - before.metrics.means[metric], abs=2e-5)
            low, high = change.intervals[metric]
            assert low <= value <= high
    with pytest.raises(InputError, match=r"reports/gone\.parquet: not found; run jobs/evaluate.py evaluate.name=gone"):
        plan_evaluation(plan.config.replace({"evaluate.earlier_report": "gone"}))


def test_a_dataset_without_times_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, users=10)  # all within some seconds
    settings = {"evaluate.recommenders": '["most-popular"]', "evaluate.memory": "fresh"}
    with pytest.raises(InputError, match="dataset has no interaction before the day of a test sample"):
        plan_evaluation(config_of(tmp_path, **settings))


def test_an_erasure_removes_the_rows_of_validation_and_test_samples(config: Config, tmp_path: Path) -> None:
    shutil.copytree(config.workspace, tmp_path / "copy")
    (tmp_path / "users.txt").write_text("u3\n")
    settings = {"workspace": str(tmp_path / "copy"), "erase.users": str(tmp_path / "users.txt")}
    assert Workspace.open(str(tmp_path / "copy")).files(HELD_OUT)
    erase(config.replace(settings), lambda _, step, calls: [step(*call) for call in calls])
    assert not Workspace.open(str(tmp_path / "copy")).files(HELD_OUT)

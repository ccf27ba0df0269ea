"""The plan of an evaluation, its runs in one process, its choices and its report. Nothing here starts Ray."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.figure import Figure
from support import toy_recommender
from support.evaluations import evaluate, rank
from support.small_endpoint import write_endpoint
from support.small_workspace import config_of, write_dataset
from support.tiny_models import tiny_config, tiny_model, tiny_tokenizer

from l2d_ray.core.metrics import NOT_RANKED
from l2d_ray.core.query import Query
from l2d_ray.errors import InputError
from l2d_ray.recommenders.contract import IndexKey
from l2d_ray.recommenders.registry import MODULES, find
from l2d_ray.stages import reports
from l2d_ray.stages.costs import Cost
from l2d_ray.stages.evaluation import (
    Plan,
    Run,
    Share,
    Trial,
    Validation,
    choose,
    final_runs,
    plan_evaluation,
    validation_runs,
)
from l2d_ray.stages.evaluator import Evaluator
from l2d_ray.stages.findings import Report
from l2d_ray.stages.index_plan import plan_index
from l2d_ray.stages.reports import LARGEST_MARK, SMALLEST_MARK, plot, plot_costs, png, table
from l2d_ray.stages.summary import ItemFrequencies, Metrics, Row, summarise


def row(recommender: str, recall: float) -> Row:
    metrics = Metrics(10, {"recall@20": recall}, {"recall@20": (recall, recall)})
    return Row(recommender, metrics, 0.1, 0.0, {}, 0.0)


def names_of(run: Run) -> list[str]:
    return [one.name for one in run.recommenders]


def test_a_new_recommender_is_evaluated_without_any_other_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module and a line in the list; its option is chosen on validation samples."""
    monkeypatch.setitem(MODULES, "toy", "support.toy_recommender")
    write_dataset(tmp_path, users=60)
    plan = plan_evaluation(config_of(tmp_path, **{"evaluate.recommenders": '["toy","most-popular"]'}))
    assert plan.indexes == []
    (run,) = validation_runs(plan)
    assert names_of(run) == ["toy", "toy"]
    found = evaluate(plan, {}).to_json()
    assert [result["recommender"] for result in found["results"]] == ["toy", "most-popular"]
    assert [result["users"] for result in found["results"]] == [60, 60]
    tried = {result["parity"]: result["recall@20"] for result in found["validation"]["results"]}
    chosen = found["validation"]["chosen"]["toy"]["parity"]
    assert chosen == max((0, 1), key=lambda parity: (tried[parity], -parity))
    found = evaluate(replace(plan, test=plan.valid), {})
    assert found.results[0].metrics.means["recall@20"] == tried[chosen]


def test_recommenders_that_write_text_are_validated_on_few_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they come first, each study is decided by its rows."""
    monkeypatch.setitem(MODULES, "toy", "support.toy_recommender")
    monkeypatch.setattr(toy_recommender, "DECLARATION", replace(toy_recommender.DECLARATION, writes_text=True))
    write_dataset(tmp_path, users=30)
    settings = {"evaluate.recommenders": '["toy","popularity-window"]', "evaluate.generation_samples": 4}
    plan = plan_evaluation(config_of(tmp_path, **settings))
    silent, text = validation_runs(plan)
    assert (names_of(silent), silent.samples) == (["popularity-window"] * 2, plan.valid)
    assert (names_of(text), text.samples) == (["toy"] * 2, plan.valid[:4])
    rows = [row("popularity-window", 0.1), row("popularity-window", 0.2), row("toy", 0.4), row("toy", 0.3)]
    assert choose(plan, rows).choices == {"popularity-window": {"days": 30}, "toy": {"parity": 0}}
    found = evaluate(plan, {})
    assert [trial.row.metrics.users for trial in found.validation.trials] == [30, 30, 4, 4]
    assert validation_runs(replace(plan, valid=[])) == []


def test_values_of_a_study_share_the_text(tmp_path: Path) -> None:
    write_dataset(tmp_path, users=20)
    names = '["d3","bigrec","grounded-beam","most-popular"]'
    plan = plan_evaluation(config_of(tmp_path, **{"evaluate.recommenders": names, "evaluate.generation_samples": 3}))
    found = evaluate(plan, {})
    trials = [trial.row for trial in found.validation.trials]
    assert [row.recommender for row in trials] == [study.recommender for study in plan.studies for _ in study.trials]
    assert len({(row.recommender, row.tokens_per_user) for row in trials}) == len(plan.studies) == 2
    assert {row.metrics.users for row in [*trials, *found.results[:3]]} == {3}
    d3, bigrec, grounded, _ = found.results
    assert bigrec.tokens_per_user == grounded.tokens_per_user < d3.tokens_per_user


def test_l2d_needs_no_head_and_text_does(tmp_path: Path) -> None:
    model = tiny_model(tiny_config("llama", tie_word_embeddings=False))
    model.model.save_pretrained(tmp_path / "headless")
    tiny_tokenizer().save_pretrained(tmp_path / "headless")
    config = write_endpoint(tmp_path, **{"model.name": tmp_path / "headless"})
    indexes = {IndexKey(config.index.space): plan_index(config).manifest}
    l2d, beam = (find(name, config, "name") for name in ("l2d-global", "constrained-beam-2"))
    query = Query.after(np.array([3, 4], np.int32), 100)
    ((found,),) = [outcome.lists for outcome in Evaluator(config, {"run": [l2d]}, indexes).recommend([l2d], [query])]
    assert len(found) == 28
    with pytest.raises(InputError, match=r"lm_head\.weight"):
        Evaluator(config, {"run": [l2d, beam]}, indexes).recommend([l2d, beam], [query])


def test_targets_are_grouped_by_their_training_samples() -> None:
    frequencies = ItemFrequencies.of(np.repeat([0, 1, 2], [1, 5, 50]), 4)
    groups = frequencies.groups(np.array([0, 1, 2, 3]))
    assert {name: in_U.nonzero()[0].tolist() for name, in_U in groups.items()} == {
        "dense": [2],
        "sparse": [0, 1],
        "cold": [3],
        "head": [2],
        "tail": [0, 1, 3],
    }
    nothing = ItemFrequencies.of(np.empty(0, np.int32), 5).groups(np.array([4]))
    assert [name for name, in_U in nothing.items() if in_U.any()] == ["cold", "tail"]


@pytest.mark.parametrize(("counts", "head"), [([5, 5], [0]), ([1, 4, 3], [1]), ([3, 3, 3], [0, 1]), ([0, 0], [])])
def test_the_head_is_the_fewest_items_with_half_of_the_training_samples(counts: list[int], head: list[int]) -> None:
    frequencies = ItemFrequencies.of(np.repeat(np.arange(len(counts)), counts), len(counts))
    assert frequencies.head_I.nonzero()[0].tolist() == head


def test_only_items_that_have_appeared_are_candidates_if_the_setting_says_so(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, users=3)
    times = dict.fromkeys(range(30), np.inf)
    for users in dataset.iter_users():
        for user in users.to_pylist():
            for item, time in zip(user["item_indices"], user["timestamps"], strict=True):
                times[item] = min(times[item], time)
    recommended = {}
    for candidates in ("catalogue", "appeared"):
        settings = {"evaluate.recommenders": '["title-knn-1"]', "evaluate.candidates": candidates}
        plan = plan_evaluation(config_of(tmp_path, **settings))
        ranks = rank(plan, [Run("test", plan.recommenders, plan.valid)], {})
        recommended[candidates] = {item for row in ranks["top"].to_pylist() for item in row}
    time_of_validation = 10
    late = {item for item, time in times.items() if time > time_of_validation}
    assert recommended["catalogue"] & late
    assert recommended["appeared"]
    assert not recommended["appeared"] & late


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Return an evaluation of several L2D, one recommender that counts and one that writes."""
    l2d = '"l2d-global","l2d-local-none","l2d-global-whiten-total+prior"'
    settings = {
        "evaluate.recommenders": f'[{l2d},"constrained-beam-7","most-popular","l2d-local"]',
        "evaluate.top_m": "[20,5]",
        "evaluate.priors": "[0,3]",
        "evaluate.fractions": "[1.0,0.5]",
        "evaluate.generation_samples": 4,
        "recommend.top_m": 9,
    }
    return plan_evaluation(write_endpoint(tmp_path_factory.mktemp("planned"), **settings))


def test_a_plan_names_the_snapshot_and_every_index(planned: Plan) -> None:
    assert planned.config.index.snapshot == 1
    spaces = ["whiten-within", "none", "whiten-total"]
    assert planned.indexes == [*map(IndexKey, spaces), IndexKey("whiten-within", 0.5)]
    assert (len(planned.valid), len(planned.test)) == (40, 40)


def test_validation_tries_every_m_and_every_prior_in_every_space(planned: Plan) -> None:
    (run,) = validation_runs(planned)
    tried = [(one.name, one.options.top_m, one.options.prior) for one in run.recommenders]
    assert len(tried) == len(set(tried)) == 3 * 4
    assert tried[:4] == [
        ("l2d-local-whiten-within", 20, 2),
        ("l2d-local-whiten-within", 5, 2),
        ("l2d-global-whiten-within", 0, 0),
        ("l2d-global-whiten-within", 0, 3),
    ]
    assert tried[4:6] == [("l2d-local-none", 20, 0), ("l2d-local-none", 5, 0)]


def test_the_best_value_is_chosen_and_of_equal_ones_the_smallest(planned: Plan) -> None:
    names = [name for run in validation_runs(planned) for name in names_of(run)]
    validation = choose(
        planned, [row(name, recall) for name, recall in zip(names, [0.2, 0.1, 0.3, 0.3] * 3, strict=True)]
    )
    assert validation.choices["whiten-within"] == {"top_m": 20, "prior": 0}
    assert [trial.values for trial in validation.trials[:3]] == [
        {"top_m": 20, "prior": 2},
        {"top_m": 5, "prior": 2},
        {"top_m": 0, "prior": 0},
    ]
    validation = choose(planned, [row(name, 0.1) for name in names])
    assert validation.choices["none"] == {"top_m": 5, "prior": 0}


def test_without_validation_samples_the_configuration_decides(planned: Plan) -> None:
    assert choose(planned, []) == Validation(
        {
            "whiten-within": {"top_m": 9, "prior": 2},
            "none": {"top_m": 9, "prior": 0},
            "whiten-total": {"top_m": 9, "prior": 0},
        },
        [],
    )


def test_a_name_says_which_options_are_tested(planned: Plan) -> None:
    chosen = {"whiten-within": {"top_m": 20, "prior": 4}, "none": {"top_m": 6}, "whiten-total": {"prior": 0.5}}
    whole, same = final_runs(planned, Validation(chosen, []))
    options = {one.name: one.options for one in whole.recommenders}
    assert options["l2d-global"].prior == 2  # as it is served
    assert options["l2d-local-none"].prior == 0  # the paper's
    assert options["l2d-global-whiten-total+prior"].prior == 0.5  # the best
    assert (options["l2d-local-none"].top_m, options["l2d-local"].top_m) == (6, 20)
    shares = ["l2d-global of 0.5", "l2d-local of 0.5", "l2d-global of 1", "l2d-local of 1"]
    assert names_of(whole)[-4:] == shares
    assert options["l2d-local of 0.5"].indexes == [IndexKey("whiten-within", 0.5)]
    assert "constrained-beam-7" not in names_of(whole)
    assert names_of(same) == [one.name for one in planned.recommenders]
    assert same.samples == planned.test[:4]
    assert same.recommenders[3].options.beams == 7


def test_recommenders_that_count_need_no_memory_and_no_model(tmp_path: Path) -> None:
    write_dataset(tmp_path, users=7)
    settings = {"evaluate.recommenders": '["most-popular","co-occurrence"]', "model.name": tmp_path / "nothing"}
    found = evaluate(plan_evaluation(config_of(tmp_path, **settings)), {})
    assert [row.recommender for row in found.results] == ["most-popular", "co-occurrence"]
    assert found.to_json()["validation"] == {"samples": 7, "results": [], "chosen": {}}
    assert found.same_users == []


def test_the_table_and_the_plots_show_every_recommender(planned: Plan) -> None:
    columns = {
        "target": np.array([0, 1, 3, 1]),
        "rank": np.array([0, 30, NOT_RANKED, 99]),
        "user_hash": np.arange(4),
        "top": [[0, 1], [1, 0], [], [5]],
        "seconds": np.repeat(0.25, 4),
        "tokens": np.repeat(12.0, 4),
    }
    ranks, frequencies = pa.table(columns), ItemFrequencies.of(np.repeat([0, 1], [50, 5]), 6)
    rows = [summarise(name, ranks, frequencies) for name in ("first", "second")]
    first = rows[0].to_json()
    assert (first["recall@20"], first["recall@50"], first["recall@100"]) == (0.25, 0.5, 0.75)
    cold, dense, sparse = (first["groups"][group] for group in ("cold", "dense", "sparse"))
    assert (cold["users"], cold["recall@100"], cold["ndcg@100"]) == (1, 0, 0)
    assert (dense["users"], dense["recall@20"], dense["ndcg@20"]) == (1, 1, 1)
    assert (sparse["users"], sparse["recall@50"], sparse["intervals"]["recall@50"]) == (2, 0.5, (0, 1))
    assert first["coverage"] == 0.5
    empty = summarise("none", ranks, ItemFrequencies.of(np.arange(6), 6)).to_json()
    assert empty["groups"]["cold"] == {"users": 0}
    lines = table(rows).splitlines()
    assert lines[1].startswith("first ")
    assert " 25.00 " in lines[1]
    assert len({len(line) for line in lines}) == 1
    trials = [Trial({"top_m": m, "prior": 0}, row("l2d-local", m / 100)) for m in (0, 10, 20)]
    trials.append(Trial({"parity": 1}, row("toy", 0.5)))
    shares = [(Share("first", share, planned.recommenders[0]), row("first of it", share / 2)) for share in (0.1, 1.0)]
    costs = {"first": Cost(0.0, 10), "second": Cost(7200.0, 20)}
    figure = plot(Report(planned, {}, Validation({}, trials), rows, [], shares, costs, [], []))
    cost, neighbours, share = figure.axes
    assert [text.get_text() for text in cost.get_legend().get_texts()] == [
        "first (4 users, 0 h)",
        "second (4 users, 2 h)",
    ]
    assert [bars[0].get_markersize() for bars in cost.containers] == [SMALLEST_MARK, LARGEST_MARK]
    assert [bars[0].get_xydata().tolist() for bars in cost.containers] == [[[0.25, 0.25]], [[0.25, 0.25]]]
    assert [line.get_xydata().tolist() for line in neighbours.lines] == [[[10, 0.1], [20, 0.2]]]  # others have no M
    assert share.lines[0].get_xydata().tolist() == [[0.1, 0.05], [1, 0.5]]
    assert png(figure).startswith(b"\x89PNG")
    nothing_compared = Report(planned, {}, Validation({}, []), rows, [], [], costs, [], [])
    assert plot(nothing_compared).axes
    assert png(plot_costs(nothing_compared)).startswith(b"\x89PNG")


def test_empty_lists_are_drawn() -> None:
    nothing = SimpleNamespace(predicted_B=np.empty(0), observed_B=np.empty(0), error=0.0)
    report = SimpleNamespace(calibrations={"l2d": SimpleNamespace(listed=nothing)})
    figure = Figure()
    reports._reliability(figure.subplots(), report)  # type: ignore[arg-type]
    assert png(figure).startswith(b"\x89PNG")

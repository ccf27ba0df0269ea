"""The paired ratios, the costs and the allowed searches of an evaluation, and their tables. Nothing here starts Ray."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.evaluations import evaluate
from support.sequences import config_of, cycles, trained, write_sequences
from support.small_endpoint import write_endpoint
from support.small_workspace import config_of as config_with_model
from support.small_workspace import write_dataset

from l2d_ray.command_line import load_config
from l2d_ray.config import Config
from l2d_ray.core.statistics import Ratio
from l2d_ray.errors import InputError
from l2d_ray.index.manifest import IndexManifest
from l2d_ray.recommenders.contract import IndexKey
from l2d_ray.recommenders.registry import find
from l2d_ray.recommenders.trained import TrainingRecord, record_of
from l2d_ray.stages import checks
from l2d_ray.stages.comparison import by_seed, document, names_by_seed, short_table
from l2d_ray.stages.costs import Cost
from l2d_ray.stages.evaluation import plan_evaluation
from l2d_ray.stages.findings import Report
from l2d_ray.stages.index_plan import plan_index
from l2d_ray.stages.summary import PairedRatio
from l2d_ray.stages.tuning import plan_trials, results_of, write_report
from l2d_ray.workspace import Workspace

ROOT = Path(__file__).parents[1]
QUICK = {"epochs": 2, "length": 6, "dimension": 8}


def cells(text: str, title: str) -> dict[str, list[str]]:
    """Return the lines of the table below a title, by their first cell."""
    (section,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return {first: others for first, *others in lines}


def compared(folder: Path, names: str, *settings: str) -> Report:
    """Evaluate recommenders that need no model."""
    config = load_config([f"workspace={folder}", f"evaluate.recommenders={names}", *settings])
    return evaluate(plan_evaluation(config), {})


@pytest.fixture(scope="module")
def l2d(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Evaluate L2D, one recommender that counts and one that writes."""
    names = '["most-popular","l2d-local","l2d-global","l2d-global+prior","grounded-beam"]'
    config = write_endpoint(
        tmp_path_factory.mktemp("l2d"),
        **{"evaluate.recommenders": names, "evaluate.generation_samples": 5, "evaluate.fractions": "[]"},
    )
    return evaluate(plan_evaluation(config), {IndexKey(config.index.space): plan_index(config).manifest})


def test_the_first_l2d_is_divided_by_every_other_one_on_the_samples_of_both(l2d: Report) -> None:
    assert [(one.reference, one.recommender, one.samples) for one in l2d.ratios] == [
        ("l2d-local", "most-popular", 40),
        ("l2d-local", "l2d-global", 40),
        ("l2d-local", "l2d-global+prior", 40),
        ("l2d-local", "grounded-beam", 5),
    ]
    means = {row.recommender: row.metrics.means["recall@20"] for row in l2d.results}
    assert l2d.ratios[0].ratio.value == pytest.approx(means["l2d-local"] / means["most-popular"], rel=1e-4)
    assert l2d.to_json()["ratios"][0]["ratio"] == l2d.ratios[0].ratio.value


def test_a_reference_that_writes_text_is_compared_on_its_own_samples(tmp_path: Path) -> None:
    write_dataset(tmp_path, users=12)
    settings = {"evaluate.recommenders": '["most-popular","grounded-beam"]', "evaluate.generation_samples": 3}
    config = config_with_model(tmp_path, **settings, **{"evaluate.reference": "grounded-beam"})
    (ratio,) = evaluate(plan_evaluation(config), {}).ratios
    assert (ratio.reference, ratio.recommender, ratio.samples) == ("grounded-beam", "most-popular", 3)


def test_a_reference_must_be_among_the_recommenders() -> None:
    with pytest.raises(InputError, match=r"evaluate.reference='ease' is not among evaluate.recommenders; add it"):
        load_config(["evaluate.recommenders=sasrec,l2d-global", "evaluate.reference=ease"])


def test_what_a_recommender_is_loaded_from_and_was_made_with_is_its_cost(l2d: Report) -> None:
    local, counting, writing = (l2d.costs[name] for name in ("l2d-local", "most-popular", "grounded-beam"))
    workspace = Workspace.open(l2d.plan.config.workspace)
    model = sum((Path(workspace.uri) / "model" / name).stat().st_size for name in ("config.json", "model.safetensors"))
    index = IndexManifest.read(workspace, l2d.indexes[IndexKey("whiten-within")])
    files = [index.fitted.map, *(file for shard in index.shards for file in shard.all_files())]
    histories = [Path(workspace.path(path)) for path in workspace.files("dataset/histories")]
    assert writing.bytes == model
    assert local.bytes == model + sum(file.bytes for file in files)
    assert local.training_seconds > 0
    assert counting == Cost(0, sum(path.stat().st_size for path in histories))


def test_the_searches_are_counted(l2d: Report) -> None:
    allowed = {one.recommender: one for one in l2d.allowances}
    local, chosen, served = (allowed[name] for name in ("l2d-local", "l2d-global+prior", "l2d-global"))
    assert (local.configurations, local.settings, local.samples, local.measure) == (6, ["top_m"], 40, "Recall@20")
    assert (chosen.configurations, chosen.settings) == (5, ["prior"])
    assert (served.configurations, served.settings, served.samples) == (1, [], 0)
    assert allowed["grounded-beam"].configurations == 1


def test_the_tables_have_every_recommender(l2d: Report) -> None:
    text = document(l2d, "figure.png")
    names = {row.recommender for row in l2d.results}
    for title in (
        "Accuracy",
        "Accuracy on the same samples",
        "Groups of targets, and coverage",
        "Cost",
        "Allowed search",
    ):
        assert cells(text, title).keys() == {"recommender", "---", *names}
    row = l2d.results[0]
    share, (low, high) = row.metrics.means["recall@20"], row.metrics.intervals["recall@20"]
    expected = f"{100 * share:.2f} ({100 * low:.2f}-{100 * high:.2f})"
    assert cells(text, "Accuracy")["most-popular"][0] == expected
    assert cells(text, "Allowed search")["l2d-local"][:4] == ["6", "top_m", "40", "Recall@20"]
    assert cells(text, "Paired ratios").keys() == {"recommender", "---", *names - {"l2d-local"}}
    assert "(figure.png)" in text
    assert "nan" not in text
    assert "## Seeds" not in text
    short = short_table(l2d).splitlines()
    assert [line.split()[0] for line in short[1:]] == [row.recommender for row in l2d.results]
    assert "l2d-local / it" in short[0]


def test_ratios_that_are_undefined_are_named(l2d: Report) -> None:
    undefined = {
        "none": (Ratio(None, None, None), "undefined: no hit", ""),
        "one": (Ratio(1.5, None, None), "1.50 (one user: no interval)", ""),
        "open": (Ratio(9.0, 1.2, None), "9.00 (1.20 or more)", "yes"),
        "level": (Ratio(1.0, 0.9, 1.1), "1.00 (0.90-1.10)", "no"),
    }
    ratios = [PairedRatio("l2d-local", name, 7, ratio) for name, (ratio, _, _) in undefined.items()]
    found = cells(document(replace(l2d, ratios=ratios), "figure.png"), "Paired ratios")
    for name, (_, text, verdict) in undefined.items():
        assert found[name] == [text, verdict, "7"]


def test_without_l2d_there_is_no_ratio_and_the_report_says_so(tmp_path: Path) -> None:
    write_sequences(tmp_path, cycles(12, 8, 9), 9)
    found = compared(tmp_path, "[most-popular,transitions]")
    assert found.ratios == []
    assert "no L2D among the recommenders" in document(found, "figure.png")
    assert "ratio" in short_table(found)


def test_of_one_user_there_is_a_ratio_without_an_interval(tmp_path: Path) -> None:
    write_sequences(tmp_path, cycles(1, 30, 5), 5)
    settings = ["evaluate.reference=transitions", "recommend.exclude_seen=false"]
    found = compared(tmp_path, "[transitions,most-popular]", *settings)
    assert found.ratios[0].ratio == Ratio(1, None, None)
    assert "1.00 (one user: no interval)" in document(found, "figure.png")


def test_trained_recommenders_have_seeds_a_cost_and_a_search(tmp_path: Path) -> None:
    write_sequences(tmp_path, cycles(30, 10, 9), 9)
    config = config_of(tmp_path, **QUICK)
    trials = plan_trials(config)[:2]
    records = [trained(trial.config) for trial in trials]
    write_report(config, results_of(trials, {}))
    best = max(records, key=lambda record: record.history[record.best_epoch - 1].ndcg)
    settings = {key: value for key, value in best.settings.items() if key.startswith("train.")}
    for name, seed in (("sasrec", 0), ("sasrec-seed1", 1)):
        trained(config.replace({**settings, "recommender": name, "train.seed": seed}))
    found = compared(tmp_path, "[sasrec,sasrec-seed1,transitions]", "evaluate.reference=transitions")
    record = TrainingRecord.read(Workspace.open(str(tmp_path)), record_of("sasrec"))
    assert found.costs["sasrec"].training_seconds == record.seconds
    assert found.costs["sasrec"].bytes == sum(f.stat().st_size for f in (tmp_path / "recommenders/sasrec").iterdir())
    search, other, none = found.allowances
    assert (search.configurations, search.samples, search.measure) == (2, 30, "NDCG@20")
    assert search.settings == [*trials[0].values, "epoch"]
    assert other.configurations == 2
    assert (none.configurations, none.settings) == (1, [])
    ((name, rows),) = by_seed(found.results).items()
    values = [row.metrics.means["recall@20"] for row in rows]
    assert name == "sasrec"
    mean, both = cells(document(found, "figure.png"), "Seeds")["sasrec"]
    assert mean == f"{100 * np.mean(values):.2f}"
    assert both == ", ".join(f"{100 * value:.2f}" for value in values)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sasrec", {"sasrec": 5, "sasrec-seed7": 7}),
        ("sasrec-large", {"sasrec-large": 5, "sasrec-large-seed7": 7}),
        ("transitions", {"transitions": 5}),
        ("l2d-global+prior", {"l2d-global+prior": 5}),
    ],
)
def test_each_seed_of_what_is_trained_has_a_name(name: str, expected: dict[str, int]) -> None:
    assert names_by_seed(name, load_config(["compare.seeds=5,7"])) == expected


def test_the_model_is_tuned_once_and_only_if_it_is_needed(tmp_path: Path) -> None:
    write_dataset(tmp_path, users=12)

    def due(**settings: Any) -> bool:
        config = config_with_model(tmp_path, **settings)
        return checks.finetuning_is_due(config, [find(n, config, "x") for n in config.evaluate.recommenders])

    l2d, counts = {"evaluate.recommenders": "[l2d-global]"}, {"evaluate.recommenders": "[ease,most-popular]"}
    assert due(**l2d)
    assert not due(**counts)
    assert not due(**l2d, **{"model.adapter": "null"})
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned/training.json").touch()
    assert not due(**l2d)
    assert due(**l2d, **{"finetune.name": "other"})


@pytest.mark.parametrize("name", ["movielens-100k", "beauty"])
def test_the_configurations_of_comparisons_name_recommenders_that_exist(name: str) -> None:
    config: Config = load_config(["--config", str(ROOT / f"jobs/configs/{name}.yaml")])
    found = [find(one, config, "evaluate.recommenders") for one in config.evaluate.recommenders]
    assert len({one.name for one in found}) == len(found)
    assert config.evaluate.reference == found[0].name


def test_a_comparison_is_checked_before_ray_starts(tmp_path: Path) -> None:
    def refused(*settings: str) -> str:
        with pytest.raises(InputError) as caught:
            checks.compare(load_config([f"workspace={tmp_path}/ws", *settings]))
        return str(caught.value)

    assert "unknown recommender" in refused("evaluate.recommenders=[sasrek]")
    assert "not found; give a file" in refused("data.source=movielens", f"data.interactions={tmp_path}/none")
    write_dataset(tmp_path / "ws", users=12)
    counts = "evaluate.recommenders=[most-popular]"
    assert "cannot train in it" in refused("evaluate.recommenders=[l2d-global]", "model.dtype=int8")
    assert "no such folder" in refused(counts, "model.name=/nowhere/model")

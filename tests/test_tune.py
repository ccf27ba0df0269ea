"""The search for the settings of a recommender: its trials, its report, and one search on Ray."""

import json
from pathlib import Path

import pytest
from support.sequences import config_of, cycles, trained, write_sequences

from l2d_ray.command_line import load_config
from l2d_ray.errors import InputError
from l2d_ray.recommenders import sasrec
from l2d_ray.stages.tuning import plan_trials, results_of, write_report

QUICK = {"epochs": 2, "length": 6, "batch_size": 64}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_sequences(tmp_path, cycles(30, 10, 9), 9)
    return tmp_path


def test_trials_are_a_part_of_the_grid_and_the_same_each_time(folder: Path) -> None:
    config = config_of(folder)
    trials = plan_trials(config)
    assert len(trials) == len({trial.name for trial in trials}) == config.tune.trials == 24
    assert trials == plan_trials(config)
    assert trials != plan_trials(config_of(folder, seed=1))
    assert sasrec.DECLARATION.trainer
    for name, values in sasrec.DECLARATION.trainer.grid.items():
        assert {trial.values[name] for trial in trials} == set(values)
    assert len(plan_trials(config.replace({"tune.trials": 1000}))) == 64


def test_a_setting_that_is_given_is_not_varied(folder: Path) -> None:
    trials = plan_trials(config_of(folder, dropout=0.3, **QUICK))
    assert {(trial.config.train.dropout, trial.config.train.length) for trial in trials} == {(0.3, 6)}
    assert all(trial.values.keys() == {"dimension", "learning_rate", "weight_decay", "loss"} for trial in trials)


def test_the_report_has_all_trials_and_the_settings_of_the_best_one(folder: Path) -> None:
    config = config_of(folder, "gru4rec", dropout=0, weight_decay=0, dimension=8, **QUICK)
    first, second = plan_trials(config)
    trained(second.config)
    results = results_of([first, second], {first.name: "the loss is not finite"})
    assert [(result.name, result.error) for result in results] == [
        (second.name, None),
        (first.name, "the loss is not finite"),
    ]
    report, settings = write_report(config, results)
    described = json.loads((folder / report).read_text())
    assert [trial["values"] for trial in described["trials"]] == [second.values, first.values]
    chosen = load_config(["--config", str(folder / settings), f"workspace={folder}"])
    assert chosen.recommender == "gru4rec"
    assert chosen.train == second.config.train
    with pytest.raises(InputError, match=r"all trials failed: it did not end; give"):
        results_of([first], {})


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_runs_each_trial_once(folder: Path, ray_session: None) -> None:
    from l2d_ray.distributed.tune import tune

    fixed = {"dimension": 8, "dropout": 0, "weight_decay": 0, "loss": "softmax", "heads": 1, **QUICK}
    config = config_of(folder, "sasrec", **fixed).replace({"workers.max": 2})
    found = tune(config)
    assert (found.trials, found.failed) == (2, 0)
    assert found.best["learning_rate"] in (1e-3, 3e-4)
    records = sorted((folder / "recommenders").glob("sasrec-tune-*/training.json"))
    before = [path.stat().st_mtime_ns for path in records]
    assert len(before) == 2
    assert tune(config) == found
    assert [path.stat().st_mtime_ns for path in records] == before

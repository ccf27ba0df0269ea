"""The training of a recommender: how it ends, also after a kill, what it leaves, and what is refused."""

import json
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.sequences import config_of, cycles, loaded, trained, write_sequences
from support.small_workspace import JOBS, environment, result_of, wait_for

from l2d_ray.config import Config, TrainConfig
from l2d_ray.data.dataset import Dataset
from l2d_ray.errors import InputError
from l2d_ray.recommenders.registry import find
from l2d_ray.recommenders.trained import Epoch
from l2d_ray.recommenders.training import Progress
from l2d_ray.schema import Split
from l2d_ray.stages import checks
from l2d_ray.stages.tuning import plan_trials
from l2d_ray.workspace import Workspace

ITEMS = 12
NAMES = ("sasrec", "esasrec", "gru4rec")
QUICK = {"dimension": 16, "length": 6, "epochs": 4, "learning_rate": 1e-2}
"""Settings of a training that takes a second."""

every_name = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a workspace of cycles."""
    write_sequences(tmp_path, cycles(40, 11, ITEMS), ITEMS)
    return tmp_path


class Killed(Exception):
    pass


def killed_after(epochs: int) -> Callable[[Sequence[Epoch]], None]:
    """Return a report that ends a training after this many epochs."""

    def report(history: Sequence[Epoch]) -> None:
        if len(history) == epochs:
            raise Killed

    return report


@every_name
def test_a_training_that_was_killed_ends_with_the_same_weights(folder: Path, tmp_path: Path, name: str) -> None:
    config = config_of(folder, name, **QUICK)
    with pytest.raises(Killed):
        trained(config, killed_after(2))
    epochs: list[int] = []
    resumed = trained(config, lambda history: epochs.append(len(history)))
    assert epochs == [2, 3, 4]
    write_sequences(tmp_path / "other", cycles(40, 11, ITEMS), ITEMS)
    whole = trained(config_of(tmp_path / "other", name, **QUICK))
    assert (resumed.sha256, resumed.best_epoch) == (whole.sha256, whole.best_epoch)
    assert [(epoch.loss, epoch.ndcg) for epoch in resumed.history] == [(one.loss, one.ndcg) for one in whole.history]
    assert not (folder / "checkpoints" / resumed.run).exists()


def test_another_seed_gives_other_weights(folder: Path) -> None:
    first = trained(config_of(folder, "sasrec", **QUICK))
    assert trained(config_of(folder, "sasrec-2", **QUICK, seed=1)).sha256 != first.sha256


def test_the_same_training_is_not_run_twice(folder: Path) -> None:
    config = config_of(folder, **QUICK)
    record, stray = trained(config), folder / "recommenders/sasrec/weights-0.safetensors"
    stray.write_bytes(b"left by a killed attempt")
    before = {path: path.stat().st_mtime_ns for path in (folder / "recommenders").rglob("*.*") if path != stray}
    assert trained(config, killed_after(0)) == record
    assert {path: path.stat().st_mtime_ns for path in (folder / "recommenders").rglob("*.*")} == before


@pytest.mark.parametrize(
    ("values", "epochs", "patience", "best", "ended"),
    [
        ([], 3, 1, 0, False),
        ([0.1], 3, 1, 1, False),
        ([0.1, 0.2, 0.2], 9, 1, 2, True),
        ([0.1, 0.2, 0.2], 9, 2, 2, False),
        ([0.1, 0.2, 0.3], 3, 9, 3, True),
        ([0.0, 0.0], 9, 1, 1, True),
    ],
)
def test_a_training_ends_after_its_epochs_or_its_patience(
    values: list[float], epochs: int, patience: int, best: int, ended: bool
) -> None:
    history = [Epoch(epoch=n + 1, loss=1.0, ndcg=value, seconds=0.0) for n, value in enumerate(values)]
    progress = Progress(history)
    assert progress.best_epoch == best
    assert progress.ended(TrainConfig(epochs=epochs, patience=patience)) == ended


def test_validation_samples_may_train_for_a_number_of_epochs(folder: Path) -> None:
    """The last epoch is kept. Such a training cannot be tuned, and no fusion has it."""
    alone = trained(config_of(folder, "sasrec", **QUICK))
    config = config_of(folder, "sasrec-valid", **QUICK, on_valid=True, patience=1)
    both = trained(config)
    assert both.samples == alone.samples + alone.valid_samples
    assert both.best_epoch == len(both.history) == QUICK["epochs"]
    assert "train.on_valid" not in alone.settings
    assert refused(plan_trials, config).startswith("train.on_valid=true: validation samples that are trained on")
    fused = find("fused:sasrec-valid+most-popular", config, "x").options
    with pytest.raises(InputError, match=r"fused='sasrec-valid': was trained with train.on_valid=true; leave it out"):
        fused.check(Dataset.open(Workspace.open(config.workspace)), [])


def refused(function: Callable[[Config], Any], config: Config) -> str:
    """Return why something is refused, without the workspace's location."""
    with pytest.raises(InputError) as caught:
        function(config)
    return str(caught.value).replace(config.workspace, "WS")


@pytest.mark.parametrize(
    ("recommender", "settings", "message"),
    [
        ("sasrek", {}, "recommender='sasrek': unknown recommender; did you mean sasrec?"),
        ("sasrec_2", {}, "recommender='sasrec_2': unknown recommender; did you mean sasrec?"),
        (
            "most-popular",
            {},
            "recommender='most-popular': needs no training; give one of sasrec, esasrec, gru4rec, alpharec,"
            " id-head, lite-llm4rec, or run jobs/evaluate.py",
        ),
        ("gru4rec", {"heads": 2}, "train.heads=2: gru4rec has no use for it; leave it out"),
        (
            "sasrec",
            {"heads": 3},
            "train.heads=3 does not divide train.dimension=64; set train.heads=1 or another divisor",
        ),
        (
            "sasrec",
            {"learning_rate": 1e30, "batch_size": 8},
            "train.learning_rate=1e+30: the loss is not finite in epoch 1; lower it",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(
    folder: Path, recommender: str, settings: dict[str, Any], message: str
) -> None:
    assert refused(trained, config_of(folder, recommender, **settings)) == message
    assert not (folder / "recommenders").exists()


@pytest.mark.parametrize(
    ("histories", "num_items", "last", "message"),
    [
        (
            [[0, 0, 0, 0]],
            1,
            (Split.VALID, Split.TEST),
            "has 1 item, so that there is nothing to rank; prepare more data",
        ),
        ([[0, 1, 2]], 3, (Split.VALID, Split.TEST), "has 0 training samples; prepare more data"),
        ([[0, 1, 2]], 3, (Split.TEST,), "has 0 validation samples; prepare the data with another data.split"),
        (
            [[0, 1, 7, 2, 1]],
            3,
            (Split.VALID, Split.TEST),
            "a history has an item that is not among the 3 items; run jobs/prepare_data.py again",
        ),
    ],
)
def test_a_dataset_that_cannot_be_trained_on_is_refused(
    tmp_path: Path, histories: list[list[int]], num_items: int, last: tuple[Split, ...], message: str
) -> None:
    write_sequences(tmp_path, histories, num_items, last)
    assert refused(trained, config_of(tmp_path)) == f"WS/dataset: {message}"


def test_other_settings_or_another_dataset_do_not_replace_a_training(folder: Path) -> None:
    config = config_of(folder, **QUICK)
    before = trained(config).sha256
    record = "WS/recommenders/sasrec/training.json"
    assert refused(checks.train, config_of(folder, **QUICK | {"epochs": 5, "seed": 1})) == (
        f"{record}: belongs to another training: train.epochs (4, now 5), train.seed (0, now 1); set"
        " recommender=sasrec-2 to keep both, or delete its folder"
    )
    again = config_of(folder, "sasrec-2", **QUICK | {"seed": 1})
    assert trained(again).sha256 != before
    dataset = write_sequences(folder, cycles(41, 11, ITEMS), ITEMS)
    assert refused(checks.train, config) == (
        f"{record}: belongs to another training: another dataset; set recommender=sasrec-2 to keep both, or delete its"
        " folder"
    )
    assert re_digest(refused(loaded, config), dataset.digest) == (
        f"{record}: trained on another dataset (OLD, now NEW); delete its folder and run jobs/train.py"
        " recommender=sasrec again"
    )


def re_digest(message: str, digest: str) -> str:
    """Replace the digests in a message."""
    old = message.partition("(")[2].partition(",")[0]
    return message.replace(old, "OLD").replace(digest[:12], "NEW")


def test_a_recommender_that_was_not_trained_is_refused_before_ray_starts(folder: Path) -> None:
    config = config_of(folder).replace({"evaluate.recommenders": ["most-popular", "esasrec-big"]})
    for function in (checks.evaluate, lambda _: loaded(config_of(folder, "esasrec-big"))):
        assert refused(function, config) == (
            "WS/recommenders/esasrec-big/training.json: not found; run jobs/train.py recommender=esasrec-big first"
        )


def test_damaged_files_are_refused(folder: Path) -> None:
    config = config_of(folder, **QUICK)
    with pytest.raises(Killed):
        trained(config, killed_after(1))
    (checkpoint,) = (folder / "checkpoints").glob("*/state.safetensors")
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:100])
    message = refused(trained, config)
    assert message.startswith(f"WS/checkpoints/{checkpoint.parent.name}/state.safetensors: damaged (")
    assert message.endswith("); delete it and run the same command again")
    checkpoint.write_bytes(whole)
    weights = folder / "recommenders/sasrec" / trained(config).weights
    again = "delete recommenders/sasrec and run jobs/train.py recommender=sasrec again"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    where = f"WS/recommenders/sasrec/{weights.name}"
    assert refused(loaded, config) == f"{where}: its checksum is not that of training.json; {again}"
    weights.unlink()
    assert refused(loaded, config) == f"{where}: not found, but training.json names it; {again}"
    record = folder / "recommenders/sasrec/training.json"
    record.write_text("{}")
    assert refused(loaded, config).startswith("WS/recommenders/sasrec/training.json: run: Field required")


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    trained(config := config_of(folder, **QUICK))
    record = folder / "recommenders/sasrec/training.json"
    record.write_text(record.read_text().replace('"dimension": 16', '"dimension": 32'))
    message = refused(loaded, config)
    assert ": holds other weights than training.json says; delete its folder and run jobs/train.py" in message


def command(folder: Path, **settings: Any) -> list[str]:
    given = [f"train.{name}={value}" for name, value in settings.items()]
    return [str(JOBS / "train.py"), f"workspace={folder}", "recommender=gru4rec", *given]


def test_the_job_prints_one_json_object(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", command(folder, **QUICK))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(sys.argv[0], run_name="__main__")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert ended.value.code == 0
    assert (result["recommender"], result["samples"], result["epochs"]) == ("gru4rec", 40 * 8, 4)
    assert result["folder"] == f"{folder}/recommenders/gru4rec"


@pytest.mark.slow
def test_a_job_that_is_killed_at_any_moment_ends_with_the_same_weights(folder: Path, tmp_path: Path) -> None:
    settings = QUICK | {"epochs": 200, "patience": 200, "dropout": 0.2}
    write_sequences(tmp_path / "whole", cycles(40, 11, ITEMS), ITEMS)
    expected = trained(config_of(tmp_path / "whole", "gru4rec", **settings))
    for _ in range(2):
        process = subprocess.Popen([sys.executable, *command(folder, **settings)], env=environment())
        seen = {path.stat().st_mtime_ns for path in folder.glob("checkpoints/*/state.safetensors")}
        wait_for(lambda: {p.stat().st_mtime_ns for p in folder.glob("checkpoints/*/state.safetensors")} - seen != set())  # noqa: B023
        process.send_signal(signal.SIGKILL)
        process.wait()
    again = subprocess.run(
        [sys.executable, *command(folder, **settings)], env=environment(), capture_output=True, text=True, check=False
    )
    assert result_of(again)["epochs"] == 200
    record = json.loads((folder / "recommenders/gru4rec/training.json").read_text())
    assert record["sha256"] == expected.sha256
    assert not Workspace.open(str(folder)).files("checkpoints")

"""jobs/build_index.py and jobs/evaluate.py on Ray: complete, killed, repeated, and with unsuitable input."""

import contextlib
import dataclasses
import io
import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from ray.exceptions import ActorUnavailableError
from support.small_workspace import ITEM_COUNT, command, config_of, environment_of_cluster, refusal, write_dataset

from l2d_ray.core.metrics import recall
from l2d_ray.core.posterior import Parameters
from l2d_ray.distributed import build_index as job
from l2d_ray.distributed.build_index import build_index
from l2d_ray.distributed.build_memory import build_memory
from l2d_ray.distributed.evaluate import evaluate
from l2d_ray.distributed.posterior import ensure_posterior
from l2d_ray.errors import InputError
from l2d_ray.index.exchange import drive
from l2d_ray.index.sharding import ShardedIndex
from l2d_ray.workspace import Workspace

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SETTINGS = {"memory.units": 2, "memory.num_shards": 3}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """Return a workspace with a dataset, a model and a memory."""
    folder = tmp_path_factory.mktemp("built")
    write_dataset(folder, users=60)
    build_memory(config_of(folder, **SETTINGS))
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """Return a copy of the workspace for one test."""
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_the_index_holds_every_row_of_the_memory_and_is_built_once(folder: Path) -> None:
    config = config_of(folder, **SETTINGS)
    first = build_index(config)
    assert (first.rows, first.items, first.shards, first.shards_reused) == (60 * 9, ITEM_COUNT, 3, 0)
    assert (first.space, first.factory, first.snapshot) == ("whiten-within", "Flat", 1)
    assert (first.recall_top_m, first.recall_top_k) == (1, 1)
    assert first.bytes_per_row > 2 * 32
    assert first.posterior is not None
    again = build_index(config)
    assert (again.index, again.shards_reused, again.posterior) == (first.index, 3, first.posterior)
    index = ShardedIndex.open(Workspace.open(str(folder)), str(Path(first.index).relative_to(folder)))
    assert sum(shard.num_rows for shard in index.shards) == first.rows


def test_default_parameters_are_replaced_by_those_of_another_workspace(folder: Path) -> None:
    fitted = build_index(config_of(folder, **SETTINGS)).posterior
    live = folder / "live"
    shutil.copytree(folder, live, ignore=shutil.ignore_patterns("live"))
    (path,) = live.rglob("posterior.json")
    defaults = {"samples": 0, "nats": None, "parameters": dataclasses.asdict(Parameters())}
    path.write_text(json.dumps(json.loads(path.read_text()) | defaults))
    assert build_index(config_of(live, **SETTINGS)).posterior == Parameters() != fitted
    with pytest.raises(InputError, match="no index with fitted parameters there"):
        ensure_posterior(config_of(live, **SETTINGS, **{"index.parameters_from": str(live / "typo")}))
    taken = build_index(config_of(live, **SETTINGS, **{"index.parameters_from": str(folder)})).posterior
    assert taken == fitted == build_index(config_of(live, **SETTINGS)).posterior


def test_an_index_of_another_model_is_built_without_parameters_and_says_so(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = build_index(config_of(folder, **SETTINGS, **{"model.num_layers": 1}))
    assert (result.rows, result.posterior) == (60 * 9, None)
    (line,) = [record.getMessage() for record in caplog.records if "posterior" in record.getMessage()]
    assert line.startswith("model.num_layers=1: ")
    assert line.endswith(". No parameters were fitted for aggregation=posterior")
    assert "posterior" not in str(list(folder.rglob("*.json")))


def test_the_same_command_completes_a_killed_job(folder: Path) -> None:
    settings = SETTINGS | {"index.factory": "IVF4,Flat"}  # tuning, after the shards, leaves time to kill the job
    job = command("build_index", folder, **settings)
    process = subprocess.Popen(job, env=environment_of_cluster(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(folder.glob("index/*/*/shard=*.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None, "the job ended before it was killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(folder.glob("index/*/*/index-*.json"))
    result = build_index(config_of(folder, **settings))
    assert result.shards_reused > 0
    assert result.rows == 60 * 9
    kept = {
        file for record in folder.glob("index/*/*/*.json") for file in re.findall(r"index/[^\"]*", record.read_text())
    }
    files = {str(path.relative_to(folder)) for path in folder.glob("index/*/whiten*/**/*") if path.is_file()}
    assert {path for path in files if not path.endswith(".json")} <= kept


def test_the_search_is_tuned_again_after_ray_gave_up_on_an_actor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    def lost_once(steps: Any, send: Callable[[Any], Any]) -> Any:
        tries.append(len(tries))
        if tries == [0]:
            send(next(steps))
            raise ActorUnavailableError("refused", None)
        return drive(steps, send)

    monkeypatch.setattr(job, "drive", lost_once)
    result = build_index(config_of(folder, **SETTINGS | {"index.factory": "IVF4,Flat"}))
    assert tries == [0, 1]
    assert result.recall_top_m >= 0.95


def test_a_missing_memory_is_refused_in_one_line(
    tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path, users=3)
    assert refusal("build_index", tmp_path, monkeypatch, capsys) == [
        f"error: {tmp_path}/memory/snapshots: no snapshot; run jobs/build_memory.py first"
    ]


def test_a_factory_that_does_not_fit_is_refused_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="FAISS cannot make an index"):
        build_index(config_of(folder, **SETTINGS, **{"index.factory": "Nonsense"}))
    lines = refusal("build_index", folder, monkeypatch, capsys, **SETTINGS, **{"index.factory": "IVF4096,Flat"})
    (line,) = [line for line in lines if "error" in line]
    assert line.startswith("error: index.factory='IVF4096,Flat': cannot be trained on 540 rows")


def test_workers_that_never_fit_are_refused_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    *_, line = refusal("build_index", folder, monkeypatch, capsys, **SETTINGS, **{"workers.gpus": 1})
    assert line.startswith(
        "error: 1 worker of workers.cpus=1 and workers.gpus=1 at once do not fit into 4 CPUs and 0 GPUs"
    )


def test_a_share_of_the_memory_too_small_for_the_index_is_named(folder: Path) -> None:
    settings = {"index.factory": "IVF200,Flat", "evaluate.fractions": "[0.1]", "evaluate.recommenders": "[l2d-local]"}
    with pytest.raises(InputError, match=r"cannot be trained on .* or leave 0\.1 out of evaluate.fractions"):
        evaluate(config_of(folder, **SETTINGS, **settings))


@pytest.fixture(scope="module")
def evaluated(built: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """Return a workspace with an evaluation, and its result with what it printed."""
    folder = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(built, folder, dirs_exist_ok=True)
    names = '["most-popular","co-occurrence","l2d-global-none","l2d-local","l2d-global","l2d-global+prior","l2d"'
    settings = {
        "evaluate.recommenders": f'{names},"constrained-beam-5","grounded-beam"]',
        "evaluate.top_m": "[5,20]",
        "evaluate.fractions": "[0.5,1.0]",
        "evaluate.generation_samples": 10,
        "evaluate.batch_size": 16,
    }
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        result = evaluate(config_of(folder, **SETTINGS, **settings))
    return folder, {"stdout": stdout.getvalue(), **json.loads(json.dumps(dataclasses.asdict(result)))}


def test_the_report_the_plots_and_every_rank_are_left_behind(evaluated: tuple[Path, dict]) -> None:
    folder, result = evaluated
    report = json.loads((folder / "reports/evaluation.json").read_text())
    assert result["report"] == str(folder / "reports/evaluation.json")
    assert (folder / "reports/evaluation.png").read_bytes().startswith(b"\x89PNG")
    names = [row["recommender"] for row in report["results"]]
    assert names == [row["recommender"] for row in result["results"]]
    assert len(names) == 9
    users = {row["recommender"]: row["users"] for row in report["results"]}
    assert users["l2d-local"] == 60
    assert users["constrained-beam-5"] == users["grounded-beam"] == 10
    assert [row["users"] for row in report["same_users"]] == [10] * 9
    assert all(row["tokens_per_user"] > 0 for row in report["results"][2:])
    validation = {(row["recommender"], row["top_m"], row["prior"]): row for row in report["validation"]["results"]}
    best = max((5, 20), key=lambda m: validation["l2d-local-whiten-within", m, 2]["recall@20"])  # of equals the smaller
    assert result["top_m"] == report["validation"]["chosen"]["whiten-within"]["top_m"] == best
    by_prior = {key[2]: row["recall@20"] for key, row in validation.items() if key[0] == "l2d-global-whiten-within"}
    assert result["prior"] == max(sorted(by_prior), key=by_prior.__getitem__)
    tried = {(row["recommender"], row["top_m"], row["prior"]) for row in report["validation"]["results"]}
    assert all(row["groups"]["dense"]["users"] for row in report["validation"]["results"])
    own = {("l2d-local-whiten-within", m, 2) for m in (5, 20)}
    assert own | {("l2d-global-whiten-within", 0, prior) for prior in (0, 1, 2, 3, 4)} < tried
    assert {row["fraction"] for row in report["fractions"]} == {0.5, 1.0}
    assert all(name in result["stdout"] for name in names)
    ranks = pq.read_table(folder / "reports/evaluation.parquet").to_pandas()
    for row in report["results"]:
        run = "test" if row["users"] == 60 else "test, same samples"
        own = ranks[(ranks["recommender"] == row["recommender"]) & (ranks["run"] == run)]
        assert own["sample_id"].nunique() == row["users"]
        assert recall(own["rank"].to_numpy(), 20).mean() == pytest.approx(row["recall@20"], abs=1e-4)
        assert 0 <= row["ndcg@20"] <= row["recall@20"] <= row["recall@50"] <= 1
        assert row["seconds_per_user"] > 0


def test_a_target_is_never_in_the_training_data_of_its_user(evaluated: tuple[Path, dict]) -> None:
    """Baselines count training samples only, and the memory holds no others."""
    folder, _ = evaluated
    ranks = pq.read_table(folder / "reports/evaluation.parquet").to_pandas()
    rows = pq.read_table(folder / "memory/data", columns=["sample_id"])["sample_id"].to_numpy()
    assert not np.isin(ranks["sample_id"].to_numpy(), rows).any()


@pytest.mark.parametrize(
    "name", ["l2d-gobal", "constrained-beam-1", "l2d-local+prior", "l2d-global-whiten", "whiten-within"]
)
def test_an_unknown_recommender_is_refused_before_anything_is_built(folder: Path, name: str) -> None:
    with pytest.raises(InputError, match=rf"evaluate.recommenders='{name.replace('+', '.')}': unknown recommender; "):
        evaluate(config_of(folder, **SETTINGS, **{"evaluate.recommenders": f'["{name}"]'}))
    assert not (folder / "index").exists()


def test_an_evaluation_with_another_model_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"^model.num_layers=1: .*/memory/settings.json records None; "):
        evaluate(config_of(folder, **SETTINGS, **{"model.num_layers": 1, "evaluate.recommenders": '["l2d-local"]'}))


def test_a_damaged_index_is_refused_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = SETTINGS | {"evaluate.recommenders": '["l2d-local"]'}
    index = Path(build_index(config_of(folder, **settings)).index)
    file = folder / json.loads(index.read_text())["shards"][1]["segments"][0]["files"]["faiss"]["path"]
    file.write_bytes(file.read_bytes()[:-10])
    *_, line = refusal("evaluate", folder, monkeypatch, capsys, **settings)
    assert line.startswith(f"error: {file}: ")


def test_a_memory_of_another_dataset_is_refused(folder: Path) -> None:
    """Its items have other indices, and its rows may be test targets of the new dataset."""
    write_dataset(folder, users=61)
    with pytest.raises(
        InputError, match=r"/dataset: snapshot 1 of the memory was built from another dataset; run jobs/build_mem"
    ):
        evaluate(config_of(folder, **SETTINGS, **{"evaluate.recommenders": '["l2d-local"]'}))

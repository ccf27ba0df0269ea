"""Every stage on a cluster of several nodes that loses some of them. `pytest -s` prints how long each stage took."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Set
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.losing_nodes import EVALUATION, FACTORY, STAGES, UNITS, kill_with_children
from support.small_memory import build
from support.small_training import assert_same, weights
from support.small_workspace import (
    arguments,
    build_units,
    config_of,
    environment_of_scripts,
    expected_ids,
    write_dataset,
)

from l2d_ray.config import Config
from l2d_ray.distributed import evaluate
from l2d_ray.index.manifest import PosteriorRecord, posterior_path
from l2d_ray.memory.verify import verify
from l2d_ray.schema import hidden_states
from l2d_ray.stages.evaluation import choose, final_runs, plan_evaluation
from l2d_ray.stages.evaluator import Evaluator
from l2d_ray.workspace import Workspace

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.alone]
SCRIPT = [sys.executable, str(Path(__file__).parent / "support/losing_nodes.py")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nodes") / "workspace"
    write_dataset(folder, users=600)
    arguments(folder)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    """Lose a cluster while the memory is built, then run every stage on another one that loses nodes."""
    environ = environment_of_scripts()
    first = subprocess.Popen([*SCRIPT, str(folder), "head"], env=environ, stdout=subprocess.PIPE, text=True)
    assert first.stdout
    assert json.loads(first.stdout.readline()) == {"ended": None}
    kill_with_children(first.pid)
    first.wait()
    stages = [stage for stage in STAGES if stage not in ("head", "zombie")]
    process = subprocess.run(
        [*SCRIPT, str(folder), *stages],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    results: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    print({stage: results[stage]["seconds"] for stage in stages})
    return results


def test_a_new_cluster_goes_on_with_the_memory_of_a_lost_one(folder: Path, found: dict[str, Any]) -> None:
    result = found["memory"]
    assert result["lost"] == 1
    assert result["reused"] == result["before"] >= 3
    assert 0 < result["left"] < UNITS["memory.units"] - result["before"]
    assert not result["committed_again"]


def test_the_memory_has_the_bytes_of_a_local_one(folder: Path, found: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(folder / "dataset", tmp_path / "dataset")
    build_units(config_of(tmp_path, **UNITS, **{"model.name": folder / "model"}))
    ours, theirs = states(folder), states(tmp_path)
    assert sorted(ours) == sorted(theirs) == expected_ids(folder)
    for sample, state in ours.items():
        np.testing.assert_array_equal(state, theirs[sample])
    assert verify(Workspace.open(str(folder))).problems == []


def states(folder: Path) -> dict[int, np.ndarray]:
    """Return the state of every sample that a committed unit names."""
    found: dict[int, np.ndarray] = {}
    for record in (folder / "memory/units").glob("*.json"):
        for file in json.loads(record.read_text())["files"]:
            rows = pq.read_table(folder / file["path"])
            ids = rows.column("sample_id").to_pylist()
            assert not found.keys() & set(ids)
            found |= zip(ids, hidden_states(rows), strict=True)
    return found


def test_the_index_has_the_bytes_of_a_local_one(folder: Path, found: dict[str, Any], tmp_path: Path) -> None:
    assert found["index"]["lost"] == 2
    shutil.copytree(folder / "memory", tmp_path / "memory")
    build(Workspace.open(str(tmp_path)), factory=FACTORY["index.factory"])
    manifest = str(Path(found["index"]["manifest"]).relative_to(folder))
    posterior = PosteriorRecord.read(Workspace.open(str(folder)), posterior_path(manifest))
    of_posterior = {folder / file.path for file in [*(one.file for one in posterior.transitions), *posterior.means]}
    assert digests(folder / "index", of_posterior) == digests(tmp_path / "index")


def digests(folder: Path, others: Set[Path] = frozenset()) -> list[str]:
    """Return the digests of the files of an index without these others; its records hold times."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".json" and path not in others]
    assert files
    return sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)


def test_the_evaluation_has_every_rank_once(folder: Path, found: dict[str, Any]) -> None:
    assert found["evaluation"]["lost"] == 1
    ranks = pq.read_table(folder / "reports/evaluation.parquet")
    assert len(ranks) == 2 * 100
    assert ranks == local_ranks(config_of(folder, **EVALUATION)).select(ranks.column_names)


def local_ranks(config: Config) -> pa.Table:
    """Evaluate in this process, without Ray."""
    plan = plan_evaluation(config)
    (run,) = final_runs(plan, choose(plan, []))
    indexes = {key: evaluate._build(plan.config, key, key in plan.fitted) for key in plan.indexes}
    samples = pd.DataFrame([evaluate._row(run, sample) for sample in run.samples])
    evaluator = Evaluator(plan.config, {run.label: run.recommenders}, indexes)
    ranks = evaluator.ranks({name: samples[name].to_numpy() for name in samples})
    return pa.table(ranks).sort_by([("sample_id", "ascending"), ("number", "ascending")])


def test_two_workers_train_to_the_weights_of_one_even_if_a_node_is_lost(folder: Path, found: dict[str, Any]) -> None:
    """ZeRO stage 2 includes stage 1. test_finetune.py has stage 3 and, with a single worker, stage 0."""
    assert found["training"]["lost"] == 1
    one, two = (weights(folder.parent / "training", name) for name in ("one", "two"))
    assert_same(two, one, tolerance=2e-3)


def test_an_endpoint_answers_the_same_again(found: dict[str, Any]) -> None:
    result = found["serving"]
    assert result["lost"] == 1
    assert len(result["before"]) == 5
    assert all(answer in ([], result["before"]) for answer in result["after"])
    assert result["after"][-1] == result["before"]

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from l2d_ray.data.dataset import Dataset
from l2d_ray.workspace import Workspace

ROOT = Path(__file__).parents[1]


@pytest.mark.embedded
@pytest.mark.ray
@pytest.mark.slow
def test_the_demo_on_three_users(tmp_path: Path) -> None:
    """The real model and data, and the real `ray job submit`."""
    workspace = tmp_path / "workspace"
    settings = [f"workspace={workspace}", "data.max_users=3", "model.num_layers=3", "memory.units=2", "workers.max=1"]
    settings += ["finetune.samples=100"]
    settings += ["evaluate.samples=8", "evaluate.generation_samples=2"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = subprocess.run(
        [sys.executable, "jobs/demo.py", "--config", "jobs/configs/demo.yaml", *settings],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        | {"PATH": path, "RAY_worker_niceness": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    titles = set(Dataset.open(Workspace.open(str(workspace))).items()["title"].to_pylist())
    assert len(result["recommended"]) == 10
    assert set(result["recommended"]) | set(result["history"]) | {result["next"]} <= titles
    assert not set(result["recommended"]) & set(result["history"])
    assert '"problems": []' in process.stderr
    assert "constrained-beam-20" in process.stdout
    rows = re.findall(r"^(before|after) +(l2d-\w+) +recall@20 ", process.stdout, re.MULTILINE)
    assert rows == [(when, name) for name in ("l2d-global", "l2d-local") for when in ("before", "after")]
    assert Path(result["report"]).exists()

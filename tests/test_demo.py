import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from l2d_ray.data.dataset import Dataset
from l2d_ray.workspace import Workspace

ROOT = Path(__file__).parents[1]
SETTINGS = ["data.max_users=3", "memory.units=2", "memory.num_shards=1", "workers.max=1"]
SETTINGS += ["finetune.samples=16", "finetune.valid_samples=4", "evaluate.samples=4"]
QUIET = r"\[\d/7\] .+|Libraries write to .+|[a-z -]+: .+|After .+|[ \d]{3}\. .+|The user's .+|\d.+| *\w+(-\w+)* .+|"


def run_demo(workspace: Path) -> subprocess.CompletedProcess[str]:
    """Run the demo on three users, with the real model and data."""
    return subprocess.run(
        [sys.executable, "jobs/demo.py", "--config", "jobs/configs/demo.yaml", f"workspace={workspace}", *SETTINGS],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        | {"RAY_worker_niceness": "0"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.embedded
@pytest.mark.ray
@pytest.mark.slow
def test_the_demo_recommends_and_evaluates_on_a_quiet_screen(tmp_path: Path) -> None:
    process = run_demo(tmp_path)
    assert process.returncode == 0, process.stderr
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    titles = set(Dataset.open(Workspace.open(str(tmp_path))).items()["title"].to_pylist())
    assert len(result["recommended"]) == 10
    assert {*result["recommended"], *result["history"], result["next"]} <= titles
    assert not set(result["recommended"]) & set(result["history"])
    assert list(result["recall_at_20"]) == re.findall(
        r"^([a-z]\S+)  ", process.stdout.partition("recommender")[2], re.M
    )
    assert Path(result["report"]).exists()
    assert re.findall(r"^\[(\d)/7\]", process.stderr, re.MULTILINE) == list("1234567")
    assert re.search("warn|INFO|DEBUG|it/s", process.stderr, re.IGNORECASE) is None

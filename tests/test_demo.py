import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from l2d_ray.data.dataset import Dataset
from l2d_ray.workspace import Workspace

ROOT = Path(__file__).parents[1]


@pytest.mark.embedded
@pytest.mark.ray
def test_the_demo_and_the_readme_on_three_users(tmp_path: Path) -> None:
    """The real model and data, the real `ray job submit`, and the README's way of reading the memory."""
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

    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    read: dict[str, np.ndarray] = {}
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        exec(code, read)
    finally:
        os.chdir(here)
    assert read["states"].shape == (len(read["rows"]), 576)
    assert np.isfinite(read["states"]).all()


def test_the_readme_names_what_is_there() -> None:
    readme, results = ((ROOT / name).read_text() for name in ("README.md", "jobs/RESULTS.md"))
    tree = readme.split("## The tree")[1].split("```")[1]
    for line in tree.splitlines():
        if match := re.match(r"  (\w+(?:\.py|/)) ", line):
            assert (ROOT / "l2d_ray" / match[1]).exists(), line
    for command in re.findall(r"python (jobs/\w+\.py)", readme + results):
        assert (ROOT / command).exists(), command
    command = [sys.executable, "jobs/prepare_data.py", "--help"]
    keys = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for key in re.findall(
        r"\b(?:data|model|finetune|workers|history|memory|index|recommend|evaluate|serve|bench)\.\w+(?==)",
        readme + results,
    ):
        assert f"--{key} " in keys, key

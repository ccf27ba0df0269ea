"""Every job on one workspace: later ones need its name alone, and none reads a setting that its help does not show."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TESTS = Path(__file__).parent
JOBS = ("prepare_data", "finetune", "build_memory", "build_index", "evaluate", "serve", "promote")
pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("jobs")
    script = [sys.executable, str(TESTS / "support/run_all_jobs.py"), str(folder)]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.run(script, capture_output=True, text=True, check=False, env=environ)
    assert process.returncode == 0, process.stderr
    results: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return results


@pytest.mark.parametrize("job", JOBS)
def test_a_job_reads_only_settings_that_its_help_shows(found: dict[str, Any], job: str) -> None:
    (reads,) = re.findall(r'reads="(.*?)"', (TESTS.parent / "jobs" / f"{job}.py").read_text())
    shown = reads.split()
    assert found[job]["reads"], "nothing was recorded"
    strange = [key for key in found[job]["reads"] if key not in shown and not key.startswith(_sections(shown))]
    assert not strange


def _sections(shown: list[str]) -> tuple[str, ...]:
    return tuple(f"{part}." for part in shown if "." not in part)


def test_the_memory_is_of_the_fine_tuned_model_and_its_settings(found: dict[str, Any]) -> None:
    settings = found["load"]["settings"]
    assert settings["model.adapter"] == found["finetune"]["result"]["adapter"]
    assert (settings["history.stride"], settings["prompt.suffix"]) == (4, "Next:")
    assert (settings["memory.num_shards"], settings["model.dtype"]) == (2, "float32")
    assert found["build_memory"]["result"]["units"] == 2


def test_the_index_that_was_built_last_is_evaluated_and_served(found: dict[str, Any]) -> None:
    assert found["load"]["settings"]["index.prior"] == 1.5
    assert found["load"]["settings"]["index.snapshot"] == found["build_index"]["result"]["snapshot"] == 1
    assert [row["recommender"] for row in found["evaluate"]["result"]["results"]][1:] == ["l2d-global", "l2d-local"]
    assert found["promote"]["result"]["version"] == found["promote"]["result"]["previous"]


def test_python_and_the_endpoint_answer_alike(found: dict[str, Any]) -> None:
    """L2D, and a recommender next to it."""
    for (status, answer), loaded in zip(found["serve"]["result"], found["load"]["result"], strict=True):
        assert status == 200
        served = answer["items"]
        assert [item["item_id"] for item in served] == [item["item_id"] for item in loaded]
        assert [item["title"] for item in served] == [item["title"] for item in loaded]
        np.testing.assert_allclose([i["score"] for i in served], [i["score"] for i in loaded], rtol=1e-3)

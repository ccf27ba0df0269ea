"""The benchmark of appends, on a real Ray with an endpoint."""

import json
from pathlib import Path

import pytest
from support.small_workspace import run_job

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]


def test_appends_are_served_and_what_was_written_is_removed(tmp_path: Path) -> None:
    settings: dict[str, object] = {
        "bench.samples": 300,
        "bench.seconds": 5,
        "bench.repeats": 1,
        "serve.deadline_seconds": 5,
    }
    run = run_job("bench_append", tmp_path, **settings)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert len(result["append_seconds"]) == len(result["segments"]) == 10
    assert result["before"]["statuses"].keys() == result["during"]["statuses"].keys() == {"200"}
    assert 1 < max(result["segments"]) < 5
    assert {path.name for path in tmp_path.iterdir()} == {"model"}

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.small_endpoint import write_endpoint
from support.small_workspace import command, environment, result_of

ROOT = Path(__file__).parents[1]


def run(stage: str, temporary: Path, before: str = "", **how: bool) -> subprocess.CompletedProcess[str]:
    """Run a stage of noisy_stages as a job, after the line `before`, with `temporary` for temporary files."""
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    call = f"{before}\nfrom l2d_ray.distributed.job import run; run('support.noisy_stages:{stage}', **{how})"
    return subprocess.run(
        [sys.executable, "-c", call],
        env=environment() | {"PYTHONPATH": path, "TMPDIR": str(temporary), "RAY_TMPDIR": "/tmp"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_only_what_l2d_ray_says_reaches_the_screen(tmp_path: Path) -> None:
    process = run("good", tmp_path, on_ray=False)
    assert process.returncode == 0, process.stderr
    assert process.stderr == "progress\na message\n"
    assert process.stdout == 'a table\n{"serve": []}\n'
    (log,) = tmp_path.glob("l2d_ray-*.log")
    noise = log.read_text()
    for source in ("C++ on stdout", "C++ on stderr", "a library", "a warning", "a logger", "a child"):
        assert f"noise of {source}" in noise
    assert noise.count("noise of a child") == 2


def test_an_unexpected_error_shows_its_traceback_and_names_the_log(tmp_path: Path) -> None:
    process = run("broken", tmp_path, on_ray=False)
    (log,) = tmp_path.glob("l2d_ray-*.log")
    assert process.returncode == 1
    first, *_, error, note = process.stderr.splitlines()
    assert first == "Traceback (most recent call last):"
    assert error == "RuntimeError: a mistake of ours"
    assert note == f"The output of libraries is in {log}"


@pytest.mark.parametrize(
    ("stage", "status", "line"),
    [
        ("refused", 2, "error: data.items='x': not found; name a file\n"),
        ("interrupted", 130, "error: interrupted; run the same command again to go on\n"),
        ("disk_full", 1, "error: [Errno 28] No space left on device; correct that and run the same command again\n"),
    ],
)
def test_an_expected_error_is_one_line(stage: str, status: int, line: str, tmp_path: Path) -> None:
    process = run(stage, tmp_path, on_ray=False)
    assert (process.returncode, process.stdout, process.stderr) == (status, "", line)


def test_an_empty_log_is_removed(tmp_path: Path) -> None:
    run("disk_full", tmp_path, on_ray=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("serves", [False, True])
def test_ray_is_quiet_and_prepared_for_http_only_where_a_stage_serves(serves: bool, tmp_path: Path) -> None:
    process = run("with_actor", tmp_path, serves=serves)
    assert process.returncode == 0, process.stderr
    assert process.stderr == "progress\na message\n"
    assert bool(json.loads(process.stdout.splitlines()[-1])["serve"]) == serves
    (log,) = tmp_path.glob("l2d_ray-*.log")
    assert re.search(r"core_worker\.cc.*constructor arguments in the object store", log.read_text())


@pytest.mark.ray
@pytest.mark.slow
def test_a_ray_that_does_not_start_in_time_is_one_line(tmp_path: Path) -> None:
    raylet = tmp_path / "raylet"
    raylet.write_text("#!/bin/sh\nexec sleep 60\n")
    raylet.chmod(0o755)
    process = run("good", tmp_path, f"import ray._private.services as ray; ray.RAYLET_EXECUTABLE = '{raylet}'")
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: Ray did not start within 30 s: this machine is too busy")


def test_jobs_with_nothing_to_do_do_without_ray(tmp_path: Path) -> None:
    write_endpoint(tmp_path)
    no_ray = environment() | {"RAY_ADDRESS": "127.0.0.1:1"}

    def result(job: str) -> dict[str, Any]:
        again = command(job, tmp_path, **{"memory.units": 1})
        return result_of(subprocess.run(again, env=no_ray, capture_output=True, text=True, check=False))

    memory, index = result("build_memory"), result("build_index")
    assert (memory["units"], memory["units_reused"], memory["snapshot"]) == (1, 1, 1)
    assert (index["shards"], index["shards_reused"], index["rows"]) == (2, 2, memory["rows"])
    assert index["posterior"]["tau"] > 0


def test_a_reader_of_the_help_may_stop_early() -> None:
    job = [sys.executable, str(ROOT / "jobs/evaluate.py"), "--help-all"]
    with subprocess.Popen(job, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, stderr = process.communicate()
    assert (process.returncode, stderr) == (0, "")

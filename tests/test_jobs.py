import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from l2d_ray.command_line import load_config
from l2d_ray.config import Config, Section, flatten

JOBS = sorted((Path(__file__).parents[1] / "jobs").glob("*.py"))
RUN_ALL = """
import json, runpy, sys
for argv in json.loads(sys.argv[1]):
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as ended:
        print(f"status {ended.code}", file=sys.stderr)
print({"ray", "torch", "transformers"} & {*sys.modules}, file=sys.stderr)
"""
LOAD_ALL = """
import pkgutil, sys
for stage in sys.argv[1:]:
    pkgutil.resolve_name(stage)
print({"torch", "transformers", "scipy.optimize"} & {*sys.modules})
"""


def arguments(job: Path) -> dict[str, Any]:
    """Return what a script passes to `run`."""
    text = job.read_text()
    found = dict(re.findall(r'^ +(\w+)="(.*?)",?$', text, re.MULTILINE))
    (found["stage"],) = re.findall(r'run\(\s*"(.*?)"', text)
    return found


def refusals(*commands: list[str]) -> list[str]:
    """Run jobs, each refused, in one process that must not import Ray or PyTorch; return what they say."""
    argv = [[str(JOBS[0].with_stem(job)), *settings] for job, *settings in commands]
    program = [sys.executable, "-c", RUN_ALL, json.dumps(argv)]
    *lines, imported = subprocess.run(program, capture_output=True, text=True, check=True).stderr.splitlines()
    assert imported == "set()"
    assert lines[1::2] == ["status 2"] * len(commands)
    return [line.removeprefix("error: ") for line in lines[0::2]]


def test_the_stages_of_jobs_that_run_no_model_themselves_load_without_pytorch() -> None:
    run_one = re.compile("bench_|serve|plan_capacity")
    stages = [arguments(job)["stage"] for job in JOBS if not run_one.match(job.stem)]
    assert len(stages) >= 14
    program = [sys.executable, "-c", LOAD_ALL, *stages]
    assert subprocess.run(program, capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_each_job_names_a_stage_and_a_check_that_exist(job: Path) -> None:
    found = arguments(job)
    for name in (found["stage"], found.get("check", found["stage"])):
        assert callable(pkgutil.resolve_name(name))


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_each_job_reads_settings_that_exist(job: Path) -> None:
    keys = flatten(Config().model_dump())
    for read in arguments(job)["reads"].split():
        kind = Config.model_fields[read.partition(".")[0]].annotation
        assert read in keys or issubclass(kind, Section)  # type: ignore[arg-type]


def test_the_help_of_a_job_fits_on_a_screen_and_a_half(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    reads = arguments(JOBS[0].with_stem("build_memory"))["reads"].split()
    with pytest.raises(SystemExit):
        load_config(["--help"], reads, "About\n" * 9)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 60
    assert max(map(len, lines)) <= 80


def test_wrong_settings_and_missing_files_are_refused_without_ray(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("uid,iid,ts\n1,10,30\n")
    (tmp_path / "items.csv").write_text("item_id,title\n10,Alien (1979)\n")
    workspace = f"workspace={tmp_path}/ws"
    files = [f"data.interactions={tmp_path}/log.csv", f"data.items={tmp_path}/items.csv"]
    columns = ["data.columns.user=uid", "data.columns.item=iid", "data.columns.timestamp=ts"]
    no_dataset = f"{tmp_path}/ws/dataset/dataset.json: not found; run jobs/prepare_data.py first"
    no_memory = f"{tmp_path}/ws/memory/snapshots: no snapshot; run jobs/build_memory.py first"
    assert refusals(
        ["build_memory", "memory.unit=1"],
        ["prepare_data", workspace, "data.source=table", *files],
        ["prepare_data", workspace, "data.source=table", *files, *columns],
        ["prepare_data", workspace, "data.source=movielens", f"data.interactions={tmp_path}/none"],
        ["finetune", workspace],
        ["build_memory", workspace],
        ["build_index", workspace],
        ["evaluate", workspace, "evaluate.recommenders=[l2d-gobal]"],
        ["evaluate", workspace],
        ["serve", workspace],
        ["promote", workspace],
        ["add_items", workspace, f"data.items={tmp_path}/items.csv"],
    ) == [
        "the command line: unknown key memory.unit; did you mean memory.units?",
        f"{tmp_path}/log.csv: no column 'user_id' among 'uid', 'iid', 'ts'; name the columns with data.columns.user,"
        " data.columns.item and data.columns.timestamp",
        f"{tmp_path}/items.csv: no column 'iid' among 'item_id', 'title'; name the columns of the items with"
        " data.columns.id_in_items and data.columns.title",
        f"data.interactions='{tmp_path}/none': not found; give a file, a folder or a URI that exists",
        no_dataset,
        no_dataset,
        no_memory,
        "evaluate.recommenders='l2d-gobal': unknown recommender; write l2d, or l2d-<global or local or"
        " posterior>[-<none, centre, whiten-total, whiten-within>][+prior], +prior not with local or posterior, for"
        " example l2d-global",
        no_dataset,
        no_memory,
        no_memory,
        no_memory,
    ]

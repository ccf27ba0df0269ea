"""The job that runs every benchmark and writes its figures into jobs/RESULTS.md."""

import dataclasses
import pkgutil
import re
import shlex
import string
import typing
from pathlib import Path

import pytest

from l2d_ray.bench import results
from l2d_ray.bench.results import Benchmark, bench_all
from l2d_ray.command_line import load_config
from l2d_ray.errors import InputError

ROOT = Path(__file__).parents[1]
DOCUMENT = """# Results

Prose before.
<!-- first -->
<!-- end of first -->

Prose between.
<!-- second -->
old figures
<!-- end of second -->
Prose after.
"""
BENCHMARKS = """
first:
  commands: |
    python jobs/toy.py one \\
        value=3
    python jobs/toy.py two value=4
  figures:
    the first and the last value: "{0[value]} and {value:.1f}"
second:
  commands: |
    python jobs/toy.py three value=5
  rows: parts
  columns:
    part: "{name}"
    its size: "{size:,}"
  document: tables
"""
JOB = """
import json, os, pathlib, sys
name, value = sys.argv[1], int(sys.argv[2].removeprefix("value="))
with open("ran", "a") as log:
    print(name, os.environ["SCRATCH"], file=log)
tables = pathlib.Path("tables.md")
tables.write_text("# A report\\n\\n## Accuracy\\n\\n| a |\\n|---|\\n| 1 |\\n\\n![plot](plot.png)\\n")
print("a line before")
print(json.dumps({"value": value, "parts": [{"name": "a", "size": 1000}], "tables": str(tables)}))
sys.exit(value < 0)
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with two benchmarks, in which this process runs."""
    root = tmp_path / "repository"
    (root / "jobs").mkdir(parents=True)
    for name, text in (("benchmarks.yaml", BENCHMARKS), ("RESULTS.md", DOCUMENT), ("toy.py", JOB)):
        (root / "jobs" / name).write_text(text)
    monkeypatch.chdir(root)
    return root


def run(repository: Path, *settings: str) -> tuple[list[str], list[str], str]:
    """Return what was measured and what was kept, and the document."""
    found = bench_all(load_config([f"workspace={repository.parent / 'scratch'}", *settings]))
    return found.measured, found.kept, Path(found.results).read_text()


def ran(repository: Path) -> list[str]:
    return [line.split()[0] for line in (repository / "ran").read_text().splitlines()]


def test_figures_stand_in_their_places_with_commands_and_machine(repository: Path) -> None:
    measured, kept, text = run(repository)
    assert (measured, kept) == (["first", "second"], [])
    assert "Prose before.\n<!-- first -->\n\n    python jobs/toy.py one \\\n        value=3\n" in text
    assert "| what | measured |\n|---|---|\n| the first and the last value | 3 and 4.0 |\n" in text
    assert "| part | its size |\n|---|---|\n| a | 1,000 |\n" in text
    assert "### Accuracy\n\n| a |\n|---|\n| 1 |\n" in text
    assert "old figures" not in text
    assert "plot" not in text
    assert "A report" not in text
    assert len(re.findall(r"^\d+ cores of .+, of which other programs used [\d.]+ before\.\n20\d\d-", text, re.M)) == 2
    assert text.endswith("<!-- end of second -->\nProse after.\n")
    assert {line.split()[1] for line in (repository / "ran").read_text().splitlines()} == {
        str(repository.parent / "scratch")
    }


def test_the_same_command_again_runs_nothing_and_writes_the_same(repository: Path) -> None:
    *_, text = run(repository)
    assert run(repository) == ([], ["first", "second"], text)
    assert ran(repository) == ["one", "two", "three"]


def test_changed_commands_run_again_and_changed_figures_do_not(repository: Path) -> None:
    run(repository)
    path = repository / "jobs/benchmarks.yaml"
    path.write_text(BENCHMARKS.replace("value=5", "value=6").replace("the first and the last value", "both"))
    measured, kept, text = run(repository)
    assert (measured, kept) == (["second"], ["first"])
    assert "| both | 3 and 4.0 |" in text


def test_only_the_named_benchmarks_run(repository: Path) -> None:
    measured, _, text = run(repository, "bench.only=second")
    assert measured == ["second"]
    assert "<!-- first -->\n<!-- end of first -->" in text
    assert ran(repository) == ["three"]


def test_the_others_run_when_one_fails(repository: Path) -> None:
    path = repository / "jobs/benchmarks.yaml"
    path.write_text(BENCHMARKS.replace("value=4", "value=-1"))
    message = r"^first: exit status 1 of python jobs/toy.py two value=-1; correct that and run this job again$"
    with pytest.raises(InputError, match=message):
        run(repository)
    assert ran(repository) == ["one", "two", "three"]
    path.write_text(BENCHMARKS)
    measured, kept, _ = run(repository)
    assert (measured, kept) == (["first"], ["second"])


def test_a_variable_that_is_not_set_is_an_error(repository: Path) -> None:
    (repository / "jobs/benchmarks.yaml").write_text(BENCHMARKS.replace("value=5", "value=$NOWHERE"))
    with pytest.raises(InputError, match="second: exit status"):
        run(repository)
    assert ran(repository) == ["one", "two"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "jobs/benchmarks.yaml").unlink(), "run this job in the root of the repository"),
        (lambda root: (root / "jobs/benchmarks.yaml").write_text("first: {figure: 1}"), "benchmarks.yaml: .*correct"),
        (lambda root: (root / "jobs/benchmarks.yaml").write_text("a: ["), "benchmarks.yaml: .*correct it"),
        (lambda root: (root / "jobs/RESULTS.md").write_text("# Empty"), "no place for 'first'; add the lines <!--"),
    ],
)
def test_unusable_files_are_refused_before_anything_runs(
    repository: Path, change: typing.Callable[[Path], object], message: str
) -> None:
    change(repository)
    with pytest.raises(InputError, match=message):
        run(repository)
    assert not (repository / "ran").exists()


def test_an_unknown_benchmark_is_refused_by_name(repository: Path) -> None:
    with pytest.raises(InputError, match=r"^bench.only: no benchmark 'third'; choose from first, second$"):
        run(repository, "bench.only=third")


class TestTheBenchmarksOfThisRepository:
    """jobs/benchmarks.yaml, jobs/RESULTS.md and the jobs agree."""

    @pytest.fixture
    def benchmarks(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, Benchmark]:
        monkeypatch.chdir(ROOT)
        return results._read([])

    def test_each_has_a_place_and_each_place_a_benchmark(self, benchmarks: dict[str, Benchmark]) -> None:
        text = (ROOT / results.RESULTS).read_text()
        assert re.findall(r"^<!-- (?!end of )(.+) -->$", text, re.MULTILINE) == list(benchmarks)
        assert re.findall(r"^<!-- end of (.+) -->$", text, re.MULTILINE) == list(benchmarks)

    def test_commands_are_accepted(self, benchmarks: dict[str, Benchmark]) -> None:
        for benchmark in benchmarks.values():
            for command in benchmark.lines():
                python, job, *arguments = shlex.split(command)
                assert (python, (ROOT / job).is_file()) == ("python", True)
                load_config(arguments)

    def test_figures_are_of_what_the_last_job_returns(self, benchmarks: dict[str, Benchmark]) -> None:
        for name, benchmark in benchmarks.items():
            job = shlex.split(benchmark.lines()[-1])[1]
            (stage,) = re.findall(r'run\(\s*"(.*?)"', (ROOT / job).read_text())
            result = typing.get_type_hints(pkgutil.resolve_name(stage))["return"]
            keys = {field.name for field in dataclasses.fields(result)}
            used = {
                part for text in benchmark.figures.values() for _, part, *_ in string.Formatter().parse(text) if part
            }
            wanted = {re.split(r"[.\[]", part)[0] for part in used} | {benchmark.rows, benchmark.document}
            assert {one for one in wanted if one and not one.isdigit()} <= keys, name

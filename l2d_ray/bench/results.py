"""Every benchmark of `jobs/benchmarks.yaml`, one after the other, and its figures in `jobs/RESULTS.md`.

In that document a benchmark owns the lines between `<!-- NAME -->` and `<!-- end of NAME -->`. They are its commands,
its figures, the machine and the date, and they are written here, never by hand.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from l2d_ray.bench.machine import Machine
from l2d_ray.config import Config
from l2d_ray.distributed.screen import say, stderr
from l2d_ray.errors import InputError, one_line
from l2d_ray.records import Record
from l2d_ray.workspace import Workspace

BENCHMARKS, RESULTS = Path("jobs/benchmarks.yaml"), Path("jobs/RESULTS.md")
"""Below the root of the repository, where the job runs."""
SCRATCH = "SCRATCH"
"""Environment variable by which commands name the folder of their workspaces."""


class _FailedError(Exception):
    """A command failed; the other benchmarks run."""


@dataclass(frozen=True)
class Benchmark:
    """Commands, and what of their results is a figure."""

    commands: str
    """Lines for a shell in the root of the repository. The last line of output of each is a JSON object."""
    figures: dict[str, str] = field(default_factory=dict)
    """By what is measured: a format string with the keys of the last result. `{0[key]}` is a key of the first one."""
    rows: str = ""
    """Key of the last result: a list of objects, each of which is a row of a table."""
    columns: dict[str, str] = field(default_factory=dict)
    """By the head of a column of that table: a format string with the keys of the row's object."""
    document: str = ""
    """Key of the last result: location of a Markdown file, whose tables are taken over."""

    def lines(self) -> list[str]:
        """Return the commands, each on one line."""
        return self.commands.strip().replace("\\\n", "").splitlines()

    def digest(self) -> str:
        """Return the SHA-256 of the commands."""
        return hashlib.sha256(self.commands.encode()).hexdigest()


class Measurement(Record):
    """The results of a benchmark's commands, and where and when they ran."""

    results: list[dict[str, Any]]
    """One of each command."""
    machine: Machine
    date: str
    seconds: float
    """Duration of all commands. What had been done by an earlier run that was killed is not in it."""
    commit: str
    """Commit of the repository, or empty."""


@dataclass(frozen=True)
class BenchAllResult:
    """The benchmarks that ran, and where their figures stand."""

    measured: list[str]
    """Names of the benchmarks that ran."""
    kept: list[str]
    """Names of those that an earlier run of this job had measured."""
    results: str
    """The document that has the figures."""


def bench_all(config: Config) -> BenchAllResult:
    """Run the benchmarks of `bench.only` that the workspace has no measurement of, and write all their figures.

    The workspace keeps each measurement in a file below `measured/`, so that the same command goes on where it was
    killed. Delete that file to measure again. Raises InputError for an unknown benchmark, for one whose place is
    missing in `jobs/RESULTS.md`, and for commands that fail, at the end.
    """
    benchmarks = _read(config.bench.only)
    repository, workspace, measured = Workspace.open("."), Workspace.open(config.workspace), []
    for name in benchmarks:
        _place(name)
    failures = []
    for name, benchmark in benchmarks.items():
        record = f"measured/{name}-{benchmark.digest()[:8]}.json"
        if not workspace.exists(record):
            try:
                _measure(name, benchmark, config.workspace).write(workspace, record)
            except _FailedError as error:
                failures.append(str(error))
                continue
            measured.append(name)
        before, after = _place(name)
        block = "\n".join(_block(benchmark, Measurement.read(workspace, record)))
        with repository.create(str(RESULTS)) as stream:
            stream.write(f"{before}{block}{after}".encode())
    if failures:
        raise InputError(f"{'; '.join(failures)}; correct that and run this job again")
    kept = [name for name in benchmarks if name not in measured]
    return BenchAllResult(measured, kept, str(RESULTS))


def _read(only: list[str]) -> dict[str, Benchmark]:
    """Return the benchmarks with these names, or all if there are none, in the order of the file."""
    try:
        found = TypeAdapter(dict[str, Benchmark]).validate_python(yaml.safe_load(BENCHMARKS.read_text()))
    except FileNotFoundError:
        raise InputError(f"{BENCHMARKS}: not found; run this job in the root of the repository") from None
    except (yaml.YAMLError, ValidationError) as error:
        raise InputError(f"{BENCHMARKS}: {one_line(error)}; correct it") from None
    for name in only:
        if name not in found:
            raise InputError(f"bench.only: no benchmark {name!r}; choose from {', '.join(found)}")
    return {name: benchmark for name, benchmark in found.items() if not only or name in only}


def _place(name: str) -> tuple[str, str]:
    """Return what is before and after the lines of a benchmark in the document."""
    first, last = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    text = RESULTS.read_text()
    if first not in text or last not in text:
        raise InputError(f"{RESULTS}: has no place for {name!r}; add the lines {first.strip()} and {last.strip()}")
    return text[: text.index(first) + len(first)], text[text.index(last) :]


def _measure(name: str, benchmark: Benchmark, scratch: str) -> Measurement:
    """Run the commands one after the other. Raises _FailedError if one fails."""
    machine, started, results = Machine.now(), time.monotonic(), []
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in benchmark.lines():
        say(f"{name}: {command}")
        program, environment = ["sh", "-euc", command], os.environ | {SCRATCH: scratch, "PATH": path}
        done = subprocess.run(program, env=environment, stdout=subprocess.PIPE, stderr=stderr(), text=True)
        if done.returncode:
            raise _FailedError(f"{name}: exit status {done.returncode} of {command}")
        results.append(json.loads(done.stdout.splitlines()[-1]))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return Measurement(
        results=results,
        machine=machine,
        date=time.strftime("%Y-%m-%d"),
        seconds=round(time.monotonic() - started, 1),
        commit=commit.stdout.strip(),
    )


def _block(benchmark: Benchmark, measurement: Measurement) -> Iterator[str]:
    """Yield the lines that a benchmark owns in the document."""
    yield ""
    yield from (f"    {line}" for line in benchmark.commands.strip().splitlines())
    yield ""
    *_, last = results = measurement.results
    figures = [[what, template.format(*results, **last)] for what, template in benchmark.figures.items()]
    yield from _table(["what", "measured"], figures)
    rows = [[template.format(**row) for template in benchmark.columns.values()] for row in last.get(benchmark.rows, [])]
    yield from _table(list(benchmark.columns), rows)
    if benchmark.document:
        yield from _tables_of(Path(last[benchmark.document]).read_text())
    at = f" at commit {measurement.commit}" if measurement.commit else ""
    yield from (f"{measurement.machine}.", f"{measurement.date}{at}, {measurement.seconds:,.0f} s.", "", "")


def _table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Yield the lines of a table in Markdown and an empty one, or nothing if it has no rows."""
    if rows:
        head_line, *lines = (f"| {' | '.join(row)} |" for row in (head, *rows))
        yield from (head_line, f"|{'---|' * len(head)}", *lines, "")


def _tables_of(text: str) -> Iterator[str]:
    """Yield the lines of a document without its title and pictures, its headings as deep as those of a section."""
    for line in text.splitlines()[1:]:
        if not line.startswith("!["):
            yield f"#{line}" if line.startswith("#") else line
    yield ""

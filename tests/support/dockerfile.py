"""Reads a Dockerfile, as far as the project's own needs it: instructions, copied files and build arguments."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Instruction(NamedTuple):
    """A keyword, such as RUN, and what follows it, with continued lines joined."""

    keyword: str
    text: str


def instructions(file: Path) -> Iterator[Instruction]:
    """Read the instructions of a Dockerfile."""
    lines = [line for line in file.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        keyword, _, text = line.partition(" ")
        yield Instruction(keyword, text)


def arguments(file: Path) -> dict[str, str]:
    """Return the build arguments with their defaults."""
    return dict(text.split("=", 1) for keyword, text in instructions(file) if keyword == "ARG")


def copied(text: str) -> tuple[list[str], str]:
    """Return the sources and the target of a COPY instruction."""
    *sources, target = text.split()
    return sources, target


def copy(text: str, context: Path, folder: Path) -> None:
    """Run a COPY instruction: from a build context to a working directory."""
    sources, target = copied(text)
    for source in sources:
        into = folder / target
        if (context / source).is_dir():
            shutil.copytree(context / source, into, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            into.mkdir(parents=True, exist_ok=True)
            shutil.copy(context / source, into)

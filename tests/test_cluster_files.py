"""The image of cluster/Dockerfile: hadolint, what it copies, and its install steps in a fresh virtual environment."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
from support.cluster_files import CLUSTER, ROOT
from support.dockerfile import arguments, copied, copy, instructions

DOCKERFILE = CLUSTER / "Dockerfile"
HADOLINT = Path(sys.executable).parent / "hadolint"
STEPS = {
    "pins": "cluster/constraints.txt cluster/",
    "torch": "constraints.txt torch",
    "dependencies": "--requirement requirements.txt",
    "code": "l2d_ray l2d_ray",
    "package": "--no-deps .",
}


def lint(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HADOLINT, "-"], input=text, capture_output=True, text=True, check=False)


def test_hadolint_finds_nothing() -> None:
    found = lint(DOCKERFILE.read_text())
    assert (found.returncode, found.stdout) == (0, "")


def test_hadolint_finds_an_unpinned_package() -> None:
    assert "DL3013" in lint(DOCKERFILE.read_text() + "RUN python -m pip install --no-cache-dir requests\n").stdout


def test_the_image_runs_as_its_user_and_has_what_probes_and_launcher_need() -> None:
    found = list(instructions(DOCKERFILE))
    assert [text for keyword, text in found if keyword == "USER"] == ["0", "1000"]
    (packages,) = [text for keyword, text in found if keyword == "RUN" and "apt-get install" in text]
    assert {"bash", "wget", "rsync", "openssh-client"} <= set(packages.split())
    environment = " ".join(text for keyword, text in found if keyword == "ENV")
    assert "HOME=/home/ray" in environment
    assert arguments(DOCKERFILE) == {"BASE": "python:3.11-slim-bookworm", "VARIANT": "cpu", "TORCH_INDEX": ""}


def test_the_context_holds_what_is_copied_and_not_more() -> None:
    lines = Path(f"{DOCKERFILE}.dockerignore").read_text().splitlines()
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    sources = {source for keyword, text in instructions(DOCKERFILE) if keyword == "COPY" for source in copied(text)[0]}
    assert "*" in lines
    assert sources == allowed
    assert all((ROOT / source).exists() for source in sources)


def test_dependencies_are_installed_below_the_code() -> None:
    order = [text for _, text in instructions(DOCKERFILE)]
    place = {name: next(n for n, text in enumerate(order) if pattern in text) for name, pattern in STEPS.items()}
    assert list(place) == sorted(place, key=place.__getitem__)


def test_every_dependency_of_the_image_is_pinned() -> None:
    command = [sys.executable, CLUSTER / "requirements.py", ROOT / "pyproject.toml", "cpu", "gcp"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    needed = {_name(line) for line in lines if line}
    pinned = {_name(line) for line in (CLUSTER / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {"ray", "faiss-cpu", "google-api-python-client"} <= needed
    assert needed - pinned == {"pip"}


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement)[0].lower().replace("_", "-")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Yield a folder that is removed at once: pytest would keep gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_steps_of_the_image_install_the_pinned_versions(folder: Path) -> None:
    """The steps of Python, for a CPU. Those of the operating system need an image."""
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    binaries, work = folder / "venv/bin", folder / "opt"
    work.mkdir()
    own = {"PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME"}
    environment = {key: value for key, value in os.environ.items() if key not in own} | arguments(DOCKERFILE)
    environment |= {"PATH": f"{binaries}:{os.environ['PATH']}", "HOME": str(folder)}
    ran = 0
    for keyword, text in instructions(DOCKERFILE):
        if keyword == "COPY":
            copy(text, ROOT, work)
        elif keyword == "RUN" and text.startswith("python"):
            subprocess.run(["bash", "-o", "pipefail", "-c", text], cwd=work, env=environment, check=True)
            ran += 1
    assert ran == 3
    pins = dict(line.split("==") for line in (CLUSTER / "constraints.txt").read_text().splitlines() if "==" in line)
    pins = {_name(name): version for name, version in pins.items()}
    installed = [line.partition("==") for line in (work / "versions.txt").read_text().splitlines() if "==" in line]
    versions = {_name(name): version.partition("+")[0] for name, _, version in installed}
    assert len(versions) > 100
    assert {name: v for name, v in versions.items() if pins.get(name) != v and not fnmatch(name, "nvidia-*")} == {}
    for command in (
        ["python", "jobs/build_memory.py", "--help"],
        ["python", "-m", "l2d_ray.distributed.serving.haproxy"],
        ["python", "-c", "import l2d_ray, ray, torch, faiss, googleapiclient; print(l2d_ray.__file__)"],
        ["ray", "--version"],
    ):
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, bool(done.stdout)) == (0, True), done.stderr

"""The sentences of README.md, jobs/RESULTS.md and cluster/README.md that a change elsewhere could make wrong."""

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import yaml
from pydantic import BaseModel
from support.small_memory import DIMENSION, write_memory

import l2d_ray
from l2d_ray.command_line import load_config
from l2d_ray.config import Config
from l2d_ray.serve.schemas import RecommendResponse

ROOT = Path(__file__).parents[1]
README, RESULTS, OPERATIONS = (ROOT / name for name in ("README.md", "jobs/RESULTS.md", "cluster/README.md"))
DOCUMENTS = (README, RESULTS, OPERATIONS)
LINES, LINES_OF_A_PARAGRAPH = 150, 5
NUMBER = r"\d(?:[\d,.]*\d)?(?:e-?\d+)?"

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE)


def section(document: Path, heading: str) -> str:
    """Return the text from a heading to the next one of the same level or above."""
    start = re.search(rf"^(#+) {re.escape(heading)}\n", document.read_text(), re.MULTILINE)
    assert start, f"no heading {heading!r} in {document}"
    rest = document.read_text()[start.end() :]
    return re.split(rf"^#{{1,{len(start[1])}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def headings(document: Path) -> dict[str, str]:
    """Return the headings by their anchor, as GitHub names it."""
    found = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-"): heading for heading in found}


def settings(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield every setting and its default."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field.get_default(call_default_factory=True)


def commands(document: Path) -> list[list[str]]:
    """Return the arguments of every `python jobs/…` in a block of code, with continuation lines joined."""
    indented = re.findall(r"(?:^    .*\n)+", document.read_text(), re.MULTILINE)
    code = [*blocks(document, "bash"), *map(dedent, indented)]
    lines = "\n".join(code).replace("\\\n", "").splitlines()
    calls = [line[line.index("python jobs/") :] for line in lines if "python jobs/" in line]
    return [shlex.split(call, comments=True)[1:] for call in calls]


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= LINES


@every_document
def test_paragraphs_are_short(document: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    for paragraph in re.split(r"\n\n|\n(?=- )", prose):
        if not paragraph.lstrip("\n").startswith(("|", "    ")):
            assert len(paragraph.strip().splitlines()) <= LINES_OF_A_PARAGRAPH, paragraph


@every_document
def test_links_lead_to_a_file_and_a_heading(document: Path) -> None:
    links = [link for link in re.findall(r"\]\((.*?)\)", document.read_text()) if "://" not in link]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


@every_document
def test_paths_exist(document: Path) -> None:
    for path in re.findall(r"(?<![\w/.])(?:l2d_ray|jobs|cluster|tests)/[\w./*-]*\w", document.read_text()):
        assert list(ROOT.glob(path)), path
    for module in re.findall(r"python -m (l2d_ray[\w.]*)", document.read_text()):
        path = module.replace(".", "/")
        assert (ROOT / f"{path}.py").exists() or (ROOT / path / "__main__.py").exists(), module


@every_document
def test_settings_exist(document: Path) -> None:
    known = dict(settings())
    sections = "|".join({key.partition(".")[0] for key in known if "." in key})
    for name in re.findall(rf"(?<![\w/.-])(?:{sections})(?:\.\w+)+", document.read_text()):
        is_file = name.endswith((".py", ".yaml", ".json"))
        assert is_file or name in known or any(key.startswith(f"{name}.") for key in known), name


def test_stated_defaults_are_the_defaults() -> None:
    known, stated = dict(settings()), dict[str, str]()
    for document in DOCUMENTS:
        stated |= re.findall(r"`([\w.]+)`(?: times)? \(default ([^)]+)\)", document.read_text())
    for row in re.findall(r"^\| `([\w.]+)` \| ([^|]+) \|", section(OPERATIONS, "Serve"), re.MULTILINE):
        stated |= [row]
    assert len(stated) > 10
    for key, default in stated.items():
        assert yaml.safe_load(default) == known[key], key


@every_document
def test_commands_are_accepted(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = [command for command in commands(document) if not any("…" in part or "$C" in part for part in command)]
    assert found
    for _, *arguments in found:
        load_config(arguments)


@every_document
def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|[`$] ?)make ([a-z][\w-]*)", document.read_text(), re.MULTILINE)) <= targets


@every_document
def test_environment_variables_are_read_somewhere(document: Path) -> None:
    sources = "".join(file.read_text() for folder in ("l2d_ray", "tests") for file in (ROOT / folder).rglob("*.py"))
    for name in set(re.findall(r"\bL2D_RAY_\w+", document.read_text())):
        assert f'"{name}"' in sources, name


def test_selected_tests_exist() -> None:
    selections = re.findall(r"pytest .*?(tests/\w+\.py) -k (\w+)", RESULTS.read_text())
    assert selections
    for file, word in selections:
        assert re.search(rf"def test_\w*{word}", (ROOT / file).read_text()), (file, word)


def test_python_blocks_name_what_l2d_ray_has() -> None:
    (code,) = blocks(README, "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= LINES_OF_A_PARAGRAPH
    used = {
        node.attr
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "l2d_ray"
    }
    assert {name for name in used if not hasattr(l2d_ray, name)} == set()


def test_the_answer_is_one_of_the_endpoint() -> None:
    (answer,) = blocks(README, "json")
    (question,) = re.findall(r"-d '(\{.*?\})'", README.read_text())
    assert len(RecommendResponse(**json.loads(answer)).items) == json.loads(question)["k"]


def test_the_memory_is_read_without_l2d_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_memory(tmp_path / "workspace", count=60)
    (code,) = blocks(OPERATIONS, "python")
    assert "l2d_ray" not in code
    monkeypatch.chdir(tmp_path)
    names: dict[str, np.ndarray] = {}
    exec(code, names)
    assert names["states"].shape == (60, DIMENSION)
    assert np.isfinite(names["states"]).all()


def test_the_tree_names_every_folder_and_nothing_else() -> None:
    folders, named = list[Path](), set[Path]()
    for line in section(README, "The tree").split("```")[1].strip("\n").splitlines():
        depth, entry, text = (len(line) - len(line.lstrip())) // 2, *line.split(maxsplit=1)
        here = (folders[depth - 1] if depth else ROOT) / entry
        folders[depth:] = [here]
        named.add(here)
        assert here.exists(), entry
        for path in re.findall(r"[\w*/]+(?:/|\.\w+)", text):
            assert any(list(base.glob(path)) for base in (here, here.parent, ROOT)), path
    assert {file.parent for file in (ROOT / "l2d_ray").glob("*/__init__.py")} <= named


def test_figures_of_the_readme_stand_in_the_results() -> None:
    text = section(README, "Results")
    by_column, by_row = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    pairs = []
    head, _, *rows = by_column.splitlines()
    for column, anchor in enumerate(re.findall(r"#([\w-]+)", head), start=2):
        pairs += [(row.split("|")[column], anchor) for row in rows]
    for row in by_row.splitlines()[2:]:
        pairs += [(row.split("|")[2], anchor) for anchor in re.findall(r"#([\w-]+)", row)]
    figures = [(figure, anchor) for cell, anchor in pairs for figure in re.findall(NUMBER, cell)]
    assert len(figures) > 25
    for figure, anchor in figures:
        results = section(RESULTS, headings(RESULTS)[anchor])
        assert re.search(rf"(?<![\d.,]){re.escape(figure)}(?!\d|[.,]\d)", results), (figure, anchor)

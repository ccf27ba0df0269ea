"""The rules of language and layout that ruff does not check. A failure lists every place as `file:line: text`."""

import ast
import inspect
import io
import re
import subprocess
import tokenize
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [path for folder in ("l2d_ray", "jobs", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
TEXTS = [
    path
    for pattern in ("*.md", "cluster/*", "jobs/**/*", "l2d_ray/serve/static/*")
    for path in sorted(ROOT.glob(pattern))
    if path.suffix in (".md", ".yaml", ".json", ".html", ".css", ".js")
]
TOP_LEVEL = {"README.md", "pyproject.toml", "LICENSE", "Makefile", "l2d_ray", "cluster", "jobs", "tests"}
LINES_PER_FILE = 300
LINES_PER_TEST_FILE = 350
WORDS_PER_SENTENCE = 30

FORBIDDEN = re.compile(
    r"\b(so\s+many|beside|mend(s|ed|ing)?|befell|lest|whoever|of\s+before|as\s+ever|of\s+(its|their|one's|our)\s+own)\b",
    re.IGNORECASE,
)
NO_OPENER = r"What|Of|As|Where|That|Whoever|From|To|How|Which|Who|Whose|Why|And|But|Or"
OPENING = re.compile(rf"(?!({NO_OPENER})\b)")
"""Start of a docstring."""
VERB = re.compile(
    rf"(?!({NO_OPENER}|Whether|If|When|Because|So|A|An|The|This|These|Those|All|Any|Both|Each|Every|No|None|Nothing|Some"
    r"|Other|Another|Such|One|Two|Three|It|Its|Their|There|About|After|At|Before|By|For|In|Into|On|Only|Over|Since"
    r"|Until|With|Without|More|\w*[^s]s)\b)[A-Z][a-z]"
)
"""Start of a function's docstring. D401 finds more nouns than this, but accepts words that it does not know."""
AMERICAN = re.compile(
    r"\b((behavior|color|center|favor|gray|neighbor)s?|labeled|modeled|canceled"
    r"|(analy|initiali|normali|optimi|organi|quanti|reali|recogni|seriali|summari|tokeni)z(e[ds]?|ing|ation))\b",
    re.IGNORECASE,
)


class Place(NamedTuple):
    """A piece of text and its position."""

    path: Path
    line: int
    text: str

    def matches(self, pattern: re.Pattern[str]) -> Iterator["Place"]:
        """Find a pattern; a place of the result is the match with the text around it."""
        for match in pattern.finditer(self.text):
            line = self.line + self.text.count("\n", 0, match.start())
            yield Place(self.path, line, self.text[max(match.start() - 30, 0) : match.end() + 30])


class Docstring(NamedTuple):
    """A docstring and its owner: a module, class or function; None for an attribute or a property."""

    place: Place
    owner: ast.AST | None


def parse_docstrings(path: Path) -> Iterator[Docstring]:
    """Read the docstrings of one source file."""
    for owner in ast.walk(ast.parse(path.read_text())):
        body = getattr(owner, "body", None)
        is_property = any("property" in ast.unparse(d) for d in getattr(owner, "decorator_list", ()))
        for index, node in enumerate(body if isinstance(body, list) else []):
            match node:
                case ast.Expr(ast.Constant(str(text))):
                    place = Place(path, node.lineno, inspect.cleandoc(text))
                    yield Docstring(place, None if index or is_property else owner)


@cache
def docstrings() -> list[Docstring]:
    """Read the docstrings of all source files."""
    return [docstring for path in SOURCES for docstring in parse_docstrings(path)]


def prose() -> Iterator[Place]:
    """Read comments and strings of the source files, and the other texts, without code in backticks."""
    for path in SOURCES:
        source = path.read_text()
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                yield Place(path, token.start[0], token.string)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield Place(path, node.lineno, without_code(node.value))
    yield from (Place(path, 1, without_code(path.read_text())) for path in TEXTS)


def without_code(text: str) -> str:
    """Remove code in backticks, but not its line ends."""
    return re.sub(r"```.*?```|`[^`]*`", lambda code: "\n" * code[0].count("\n"), text, flags=re.DOTALL)


def sentences(text: str) -> Iterator[str]:
    """Split a docstring into sentences. A list item is a sentence; indented examples are left out."""
    text = "\n".join(line for line in text.splitlines() if not line.startswith(" "))
    for paragraph in re.split(r"\n\n|\n(?=(?:\d+\.|-|\*) )", text):
        yield from re.split(r"(?<=[.!?])\s", paragraph)


def expect_none(places: Iterable[Place]) -> None:
    """Fail if there is a place, and list all of them."""
    lines = [f"{path.relative_to(ROOT)}:{line}: {' '.join(text.split())[:100]}" for path, line, text in sorted(places)]
    if lines:
        pytest.fail("\n".join([f"{len(lines)} places:", *lines]), pytrace=False)


def test_no_forbidden_word_is_used() -> None:
    places = (place for place in prose() if place.path != Path(__file__))
    expect_none(match for place in places for match in place.matches(FORBIDDEN))


def test_spelling_is_british() -> None:
    places = (place._replace(text=without_code(place.text)) for place, _ in docstrings())
    expect_none(match for place in places for match in place.matches(AMERICAN))


def test_no_docstring_continues_the_name_that_it_describes() -> None:
    expect_none(place for place, _ in docstrings() if not OPENING.match(place.text))


def test_the_docstring_of_a_function_opens_with_a_verb() -> None:
    functions = (
        place
        for place, owner in docstrings()
        if isinstance(owner, ast.FunctionDef | ast.AsyncFunctionDef) and not owner.name.startswith("test_")
    )
    expect_none(place for place in functions if not VERB.match(place.text))


def test_sentences_in_docstrings_are_short() -> None:
    """A sentence that lists the reasons for an error may be longer."""
    expect_none(
        place._replace(text=sentence)
        for place, _ in docstrings()
        for sentence in sentences(place.text)
        if len(sentence.split()) > WORDS_PER_SENTENCE and not sentence.startswith("Raises ")
    )


def test_source_files_are_short() -> None:
    lengths = (Place(path, len(path.read_text().splitlines()), "last line") for path in SOURCES)
    tests = ROOT / "tests"
    expect_none(
        place
        for place in lengths
        if place.line > (LINES_PER_TEST_FILE if place.path.is_relative_to(tests) else LINES_PER_FILE)
    )


def test_the_top_level_of_the_repository_is_as_designed() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    files = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    names = {file.split("/")[0] for file in files}
    assert {name for name in names if not name.startswith(".")} == TOP_LEVEL

"""Every error message that a user can reach by a wrong setting or file, as the source code has it.

`python tests/support/error_messages.py` writes them to error_messages.txt, one a line; test_error_messages.py compares.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_suffix(".txt")
ERRORS = {"InputError", "NoReplicaError"}


def listed() -> list[str]:
    """Return the messages of the list, each as `file: message`."""
    return LIST.read_text().splitlines()


def in_source() -> list[str]:
    """Return the messages in the source code, each as `file: message`, with expressions in braces."""
    paths = sorted((ROOT / "l2d_ray").rglob("*.py"))
    return [f"{path.relative_to(ROOT)}: {text}" for path in paths for text in _messages(path)]


def _messages(path: Path) -> Iterator[str]:
    """Yield the texts of the errors that a file makes, in its order. Messages that were made elsewhere are left out."""
    errors = ERRORS | ({"ValueError"} if "config" in path.parts else set())
    tree = ast.parse(path.read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    for call in sorted(calls, key=lambda call: call.lineno):
        if call.func.id in errors and (text := _text(call.args[0])):  # type: ignore[attr-defined]
            yield text


def _text(node: ast.expr) -> str:
    match node:
        case ast.Constant(str(text)):
            return text
        case ast.JoinedStr(values):
            return "".join(_text(value) for value in values)
        case ast.FormattedValue(value):
            return "{" + ast.unparse(value) + "}"
    return ""


if __name__ == "__main__":
    LIST.write_text("".join(f"{line}\n" for line in in_source()))

"""The command line: a YAML file and dotted overrides become a configuration.

    python jobs/build_memory.py --config jobs/configs/demo.yaml memory.units=32 model.num_layers=10

Overrides win over the file, the file over the defaults of `l2d_ray.config`. Unknown keys, wrong types and impossible
values raise `InputError` with the key, the value and what would be accepted.
"""

import os
import re
import shutil
import sys
import textwrap
import threading
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from l2d_ray.config import Config
from l2d_ray.errors import InputError, one_line

COLUMN = 34
"""Column of the help at which descriptions begin."""
_parsing = threading.Lock()
"""Held while the parser, which keeps the arguments, is in use."""


def load_config(
    argv: Sequence[str], reads: Sequence[str] = (), about: str = "", temporary_folder: bool = False
) -> Config:
    """Return the configuration of a command line: `[--config FILE] [key=value | --key=value | --key value …]`.

    With `temporary_folder`, the working folder is deleted after the run, and a relative workspace is refused. Raises
    InputError. `--help` prints `about` and the settings that the job `reads` (sections or keys; none stands for all),
    `--help-all` prints all settings in full; both exit.
    """
    if "--help" in argv or "-h" in argv:
        _print_help(about, [key for key in _keys() if not reads or key.startswith(_prefixes(reads))], full=False)
    if "--help-all" in argv:
        _print_help(about, _keys(), full=True)
    path, arguments = _take_config(_as_options(argv))
    tree = _merge(_read_yaml(path), _parse(arguments))
    if temporary_folder:
        _refuse_relative(tree.get("workspace", Config.model_fields["workspace"].default))
    return make_config(tree, path or "the command line")


def _as_options(argv: Sequence[str]) -> list[str]:
    """Return the arguments with `--` before each key."""
    arguments: list[str] = []
    for before, argument in pairwise(["", *argv]):
        is_value = before.startswith("--") and "=" not in before  # of `--key value`, whatever it looks like
        is_key = re.match(r"[a-z_]+(\.[a-z_]+)*=", argument) and not is_value
        arguments.append(f"--{argument}" if is_key else argument)
    return arguments


def _parse(arguments: list[str]) -> dict[str, Any]:
    """Return options as nested settings. Raises InputError for what is no setting."""
    from pydantic_settings import SettingsError  # --help does without, and they take 0.1 s

    try:
        with _parsing:
            found: dict[str, Any] = _parser()(args=arguments)()
    except SettingsError as error:
        raise InputError(_explain_arguments(str(error))) from None
    return found


@cache
def _parser() -> Any:
    """Return the parser of all settings, which takes a twentieth of a second to make."""
    from pydantic_settings import CliSettingsSource

    return CliSettingsSource[Any](
        Config,  # type: ignore[arg-type]  # it takes any model of pydantic
        cli_exit_on_error=False,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_parse_none_str="null",
    )


def make_config(tree: Mapping[str, Any], origin: str) -> Config:
    """Return the configuration of nested settings. Raises InputError that names `origin`, the key and the value."""
    try:
        return Config(**tree)
    except ValidationError as error:
        raise explained(error, origin) from None


def explained(error: ValidationError, origin: str) -> InputError:
    """Return the errors of a configuration in one line that names `origin`, keys and values."""
    return InputError("; ".join(_explain(dict(e), origin) for e in error.errors()))


def _refuse_relative(workspace: Any) -> None:
    if isinstance(workspace, str) and "://" not in workspace and not Path(workspace).expanduser().is_absolute():
        raise InputError(
            f"workspace={workspace!r}: a submitted job runs in a temporary copy of this folder, where the result would"
            " be lost; give an absolute path or a URI"
        )


def _take_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    for i, argument in enumerate(arguments):
        if argument == "--config":
            if i + 1 == len(arguments):
                raise InputError("--config: no file is named; give the path of a YAML file")
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
        if argument.startswith("--config="):
            return argument.removeprefix("--config="), arguments[:i] + arguments[i + 1 :]
    return None, arguments


def _read_yaml(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    import yaml

    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}; name a readable YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: not YAML ({one_line(error)}); correct the file") from None
    if not isinstance(tree or {}, dict):
        raise InputError(f"--config {path}: holds a {type(tree).__name__}, not settings; write `key: value` lines")
    strange = [key for key in tree or {} if not isinstance(key, str)]
    if strange:
        raise InputError(f"--config {path}: unknown key {strange[0]!r}; --help-all lists the keys")
    return tree or {}


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        mergeable = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if mergeable else value
    return merged


def _fields(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every setting's dotted key and its field, in the order of the tree."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _fields(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _keys() -> list[str]:
    return [key for key, _ in _fields()]


def _did_you_mean(key: str) -> str:
    near = get_close_matches(key, _keys(), n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else "--help-all lists the keys"


def _explain(error: dict[str, Any], origin: str) -> str:
    key, message, value = ".".join(map(str, error["loc"])), str(error["msg"]), error["input"]
    if error["type"] == "extra_forbidden":
        return f"{origin}: unknown key {key}; {_did_you_mean(key)}"
    if message.startswith("Value error, "):
        message = message.removeprefix("Value error, ")
        return (
            f"{origin}: {message}" if isinstance(value, dict | BaseModel) else f"{origin}: {key}={value!r}: {message}"
        )
    return f"{origin}: {key}={value!r} is not accepted; {_remedy(message)}"


def _remedy(message: str) -> str:
    """Return what to do about pydantic's message."""
    if "valid dictionary" in message:
        return "this is a section: give its keys"
    if "match pattern" in message and "in\\(" in message:
        return "give a value, several as in(a,b), or ! and one of these"
    if "match pattern" in message:
        return "give a name of letters, digits, dots, hyphens and underscores"
    message = message.partition(", unable to")[0].partition(" after validation")[0]
    for start, remedy in (
        ("Input should be a valid ", "give a valid "),
        ("Input should be greater", "give a value greater"),
        ("Input should be less", "give a value less"),
        ("Input should be ", "give "),
        ("List should have ", "give "),
    ):
        if message.startswith(start):
            return remedy + message.removeprefix(start)
    return message[0].lower() + message[1:]


def _explain_arguments(message: str) -> str:
    message = message.removeprefix("error parsing CLI: ")
    if unknown := re.search(r"unrecognized arguments: --([^ =]+)", message):
        return f"the command line: unknown key {unknown[1]}; {_did_you_mean(unknown[1])}"
    if stray := re.search(r"unrecognized arguments: (.*)", message):
        return f"the command line: {stray[1]!r} is no setting; write key=value"
    if valueless := re.search(r"argument --(\S+): expected one argument", message):
        return f"the command line: {valueless[1]} has no value; write {valueless[1]}=value"
    return f"the command line: {message}"


def _prefixes(reads: Sequence[str]) -> tuple[str, ...]:
    keys = _keys()
    return tuple(read if read in keys else f"{read}." for read in reads)


def _print_help(about: str, keys: Sequence[str], full: bool) -> NoReturn:
    """Print settings, section by section, with their defaults, and exit."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    lines = [f"usage: {Path(sys.argv[0]).name} [--config FILE] [key=value …]", ""]
    lines += [about.strip()] if about else []
    section = ""
    for key, field in _fields():
        if key not in keys:
            continue
        if key.partition(".")[0] != section:
            section = key.partition(".")[0]
            lines += ["", _heading(section)] if "." in key else [""]
        lines.append(_entry(key, field, full, width))
    lines += ["", "Values are defaults; settings that the workspace records replace them."]
    lines.append("" if full else "--help-all describes every setting of every job in full.")
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:  # the reader has seen enough; Python would try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def _heading(section: str) -> str:
    kind = Config.model_fields[section].annotation
    return f"{section}: {_first_sentence(str(kind.__doc__))}"


def _entry(key: str, field: FieldInfo, full: bool, width: int) -> str:
    text = " ".join(str(field.description).split())
    kind = field.annotation
    choices = ", ".join(map(str, get_args(kind))) if get_origin(kind) is Literal else ""
    text = (text if full else _first_sentence(text)) + (f" One of {choices}." if choices else "")
    start = f"  {key}={_default(field)}"
    if len(start) > COLUMN - 2:
        return start + "\n" + textwrap.fill(text, width, initial_indent=" " * COLUMN, subsequent_indent=" " * COLUMN)
    return textwrap.fill(text, width, initial_indent=start.ljust(COLUMN), subsequent_indent=" " * COLUMN)


def _default(field: FieldInfo) -> str:
    """Return a default as a user would write it."""
    value = field.default
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return ",".join(map(str, value))
    return repr(value) if "\n" in str(value) or value == "" else str(value)


def _first_sentence(text: str) -> str:
    found = re.match(r".*?\.(?=\s|$)", " ".join(text.split()))
    return found[0] if found else text

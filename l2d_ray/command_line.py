"""The command line: a YAML file and dotted overrides become a configuration.

    python jobs/build_memory.py --config jobs/configs/demo.yaml memory.units=32 model.num_layers=10

Overrides win over the file, the file over the defaults of `config.py`. Unknown keys, wrong types and impossible values
raise `InputError` with the key, the value and what would be accepted.
"""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_settings import CliSettingsSource, SettingsError

from l2d_ray.config import Config
from l2d_ray.errors import InputError, one_line


def load_config(argv: Sequence[str]) -> Config:
    """The configuration of a command line: `[--config FILE] [key=value | --key=value | --key value …]`.

    Raises InputError. `--help` prints every key with its default and exits.
    """
    arguments: list[str] = []
    for before, argument in pairwise(["", *argv]):
        is_value = before.startswith("--") and "=" not in before  # of `--key value`, whatever it looks like
        is_key = re.match(r"[a-z_]+(\.[a-z_]+)*=", argument) and not is_value
        arguments.append(f"--{argument}" if is_key else argument)
    path, arguments = _take_config(arguments)
    origin = path or "the command line"
    try:
        command_line = CliSettingsSource[Any](
            Config,
            cli_parse_args=arguments,
            cli_exit_on_error=False,
            cli_hide_none_type=True,
            cli_avoid_json=True,
            cli_parse_none_str="null",
        )()
        return Config(**_merge(_read_yaml(path), command_line))
    except SettingsError as error:
        raise InputError(_explain_arguments(str(error))) from None
    except ValidationError as error:
        raise InputError("; ".join(_explain(dict(e), origin) for e in error.errors())) from None


def _take_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    for i, argument in enumerate(arguments):
        if argument == "--config":
            if i + 1 == len(arguments):
                raise InputError("--config needs a file")
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
        if argument.startswith("--config="):
            return argument.removeprefix("--config="), arguments[:i] + arguments[i + 1 :]
    return None, arguments


def _read_yaml(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}; name a readable YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: not YAML: {one_line(error)}") from None
    if not isinstance(tree or {}, dict):
        raise InputError(f"--config {path}: expected keys and values, found a {type(tree).__name__}")
    strange = [key for key in tree or {} if not isinstance(key, str)]
    if strange:
        raise InputError(f"--config {path}: unknown key {strange[0]!r}; --help lists the keys")
    return tree or {}


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        mergeable = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if mergeable else value
    return merged


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys += _keys(inner, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _did_you_mean(key: str) -> str:
    near = get_close_matches(key, _keys(Config), n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else "--help lists the keys"


def _explain(error: dict[str, Any], origin: str) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{origin}: unknown key {key}; {_did_you_mean(key)}"
    message = error["msg"].removeprefix("Value error, ")
    if isinstance(error["input"], dict | BaseModel):
        return f"{origin}: {message}" if key in message else f"{origin}: {key}: {message}"
    return f"{origin}: {key}={error['input']!r}: {message}"


def _explain_arguments(message: str) -> str:
    unknown = re.search(r"unrecognized arguments: --([^ =]+)", message)
    if unknown:
        return f"the command line: unknown key {unknown[1]}; {_did_you_mean(unknown[1])}"
    return f"the command line: {message.removeprefix('error parsing CLI: ')}"

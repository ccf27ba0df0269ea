"""A record of the settings that processes read: `install()` in each process, and the file that RECORDED_READS names."""

import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from l2d_ray.config import Config, Section

VARIABLE = "RECORDED_READS"


def install() -> None:
    """Record each setting that is read from now on, but by the configuration's validators."""
    prefixes = _prefixes(Config, "")
    sections = {prefix.rstrip(".") for prefix in prefixes.values()}

    def read(self: Any, name: str) -> Any:
        key = f"{prefixes[type(self)]}{name}"
        if name in type(self).model_fields and key not in sections and not _is_validator(sys._getframe(1)):
            with Path(os.environ[VARIABLE]).open("a") as file:
                file.write(f"{key}\n")
        return object.__getattribute__(self, name)

    for kind in (Config, Section):
        kind.__getattribute__ = read  # type: ignore[method-assign]


def recorded() -> set[str]:
    """Return the settings that were read since the last call, by dotted key."""
    path = Path(os.environ[VARIABLE])
    keys = set(path.read_text().split()) if path.exists() else set()
    path.unlink(missing_ok=True)
    return keys


def _prefixes(kind: type[Any], prefix: str) -> dict[type[Any], str]:
    found = {kind: prefix}
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found |= _prefixes(field.annotation, f"{prefix}{name}.")
    return found


def _is_validator(caller: FrameType) -> bool:
    return caller.f_code.co_name.startswith("_check_")

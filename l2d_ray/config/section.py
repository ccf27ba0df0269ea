"""The base class of the sections, and types of settings: locations that mean the same in every process, and names."""

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator


class Section(BaseModel):
    """A part of the configuration tree: immutable, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_boolean_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Raise ValueError for `units: true`, which Pydantic would read as 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation is not bool:
            raise ValueError("a boolean is not accepted here; give a value of the setting's type")
        return value


def _folder(location: str) -> str:
    """Return the absolute path of a folder, links followed; a URI as it is. Raises ValueError for half a URI."""
    if re.match(r"(s3|gs|file):(?!//)", location):
        raise ValueError(f"{location!r}: not a URI; write {location.replace(':', '://', 1).replace(':///', '://')!r}")
    return location if "://" in location else str(Path(location).expanduser().resolve())


def _model(name: str) -> str:
    """Return the absolute path of a model on this machine; a hub id, a URI or `demo` as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name != "demo" and path.exists() else name


def _file(location: str) -> str:
    """Return the absolute path of a file; a URI as it is. Links are kept: they may change while a process runs."""
    return location if "://" in location else str(Path(location).expanduser().absolute())


Folder = Annotated[str, AfterValidator(_folder)]
"""A folder or its URI."""
Model = Annotated[str, AfterValidator(_model)]
"""A model: hub id, folder, URI or file."""
File = Annotated[str, AfterValidator(_file)]
"""A file, a folder of files, or its URI."""
Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
"""A name of files or of a folder in the workspace."""

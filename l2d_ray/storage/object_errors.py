"""Errors of obstore as OSErrors in one line."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

from l2d_ray.errors import one_line


@contextmanager
def as_os_error(path: str) -> Iterator[None]:
    """Raise what obstore reports as OSError, in one line with the path."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: {_reason(error)}") from None
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise PermissionError(f"{path}: {_reason(error)}") from None
    except BaseError as error:
        raise OSError(f"{path}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Return what a server says in its XML, or else obstore's message, without its debugging text."""
    text = one_line(str(error).partition("Debug source:")[0])
    code, message = (re.search(f"<{tag}>([^<]*)", text) for tag in ("Code", "Message"))
    return f"{code[1]}: {message[1]}" if code and message else text

"""The user's screen: what a job says itself, apart from what libraries print.

Ray, DeepSpeed, Hugging Face and the programs they start print plans, bars and warnings that no user can act on.
`quiet_libraries` sends them to a log file; `say`, `show` and the loggers of l2d_ray still reach the user.
"""

import io
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

_user: dict[int, TextIO] = {}
"""The user's stdout (1) and stderr (2) while those of the process lead to a log file."""


def stderr() -> TextIO:
    """Return the stream for progress and messages."""
    return _user.get(2, sys.stderr)


def say(line: str) -> None:
    """Print a line on the user's stderr, above a progress bar if there is one."""
    tqdm.write(line, file=stderr())


def show(text: str) -> None:
    """Print a result on the user's stdout."""
    print(text, file=_user.get(1, sys.stdout), flush=True)


@contextmanager
def quiet_libraries(name: str) -> Iterator[Path]:
    """Send all other output of this process and its children to a new log file, and yield its path.

    An exception gets a note with that path. The file is left in the folder for temporary files unless it is empty.
    """
    descriptor, path = tempfile.mkstemp(prefix=f"l2d_ray-{name}-", suffix=".log")
    with ExitStack() as stack:
        stack.callback(_remove_if_empty, Path(path))
        log = stack.enter_context(os.fdopen(descriptor, "w", buffering=1, encoding="utf-8", errors="replace"))
        _redirect(stack, log)
        stack.enter_context(_l2d_ray_logs())
        try:
            yield Path(path)
        except Exception as error:
            if Path(path).stat().st_size:
                error.add_note(f"The output of libraries is in {path}")
            raise


def _redirect(stack: ExitStack, log: TextIO) -> None:
    """Point stdout and stderr, those of Python and those of the process, to `log` until `stack` is closed."""
    user = {1: sys.stdout, 2: sys.stderr}

    def restore() -> None:
        _user.clear()
        sys.stdout, sys.stderr = user[1], user[2]

    for descriptor, stream in user.items():
        stream.flush()
        copy = os.dup(descriptor)
        stack.callback(os.close, copy)
        stack.callback(os.dup2, copy, descriptor)
        _user[descriptor] = _on(copy, stream) if _writes_to(stream, descriptor) else stream
        os.dup2(log.fileno(), descriptor)
    stack.callback(restore)
    sys.stdout = sys.stderr = log


def _writes_to(stream: TextIO, descriptor: int) -> bool:
    try:
        return stream.fileno() == descriptor
    except io.UnsupportedOperation:  # a test holds it in memory
        return False


def _on(descriptor: int, stream: TextIO) -> TextIO:
    """Return a stream like `stream` on another descriptor, which it leaves open."""
    return os.fdopen(descriptor, "w", buffering=1, encoding=stream.encoding, errors=stream.errors, closefd=False)


@contextmanager
def _l2d_ray_logs() -> Iterator[None]:
    """Print what the loggers of l2d_ray say, from INFO on, on the user's stderr."""
    logger, handler = logging.getLogger("l2d_ray"), _ScreenHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


class _ScreenHandler(logging.Handler):
    """A logging handler that prints messages with `say`."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message, without its level and origin."""
        say(self.format(record))


def _remove_if_empty(path: Path) -> None:
    if not path.stat().st_size:
        path.unlink()

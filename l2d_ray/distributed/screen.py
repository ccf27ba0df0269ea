"""The user's screen: what a job says itself, apart from what libraries print.

Ray, DeepSpeed, Hugging Face and the programs they start print plans, bars and warnings that a user can do nothing about.
`quiet_libraries` sends them to a log file; `say`, `show` and the loggers of l2d_ray still reach the user.
"""

import contextlib
import io
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

_streams: dict[int, TextIO] = {}
"""The user's stdout (1) and stderr (2) while those of the process lead to a log file."""


def stderr() -> TextIO:
    """Return the stream of progress and messages."""
    return _streams.get(2, sys.stderr)


def say(line: str) -> None:
    """Print a line on the user's stderr, above a progress bar that may be there."""
    tqdm.write(line, file=stderr())


def show(text: str) -> None:
    """Print a result on the user's stdout."""
    stderr().flush()
    print(text, file=_streams.get(1, sys.stdout), flush=True)


@contextmanager
def quiet_libraries(name: str) -> Iterator[Path]:
    """Send all other output of this process and of its children to a new log file, whose path is yielded.

    An empty log is removed at the end; any other stays in the folder of temporary files.
    """
    descriptor, path = tempfile.mkstemp(prefix=f"l2d_ray-{name}-", suffix=".log")
    messages, before = logging.getLogger("l2d_ray"), (sys.stdout, sys.stderr)
    handler = _Messages()
    with contextlib.ExitStack() as restored, os.fdopen(descriptor, "w", buffering=1, encoding="utf-8") as log:
        for number, stream in enumerate(before, start=1):
            stream.flush()
            copy = os.dup(number)
            restored.callback(os.close, copy)
            restored.callback(os.dup2, copy, number)
            _streams[number] = _user_stream(stream, number, copy)
            os.dup2(descriptor, number)
        sys.stdout = sys.stderr = log
        messages.addHandler(handler)
        level = messages.level
        messages.setLevel(logging.INFO)
        try:
            yield Path(path)
        finally:
            messages.setLevel(level)
            messages.removeHandler(handler)
            sys.stdout, sys.stderr = before
            _streams.clear()
    if not Path(path).stat().st_size:
        Path(path).unlink()


def _user_stream(stream: TextIO, descriptor: int, copy: int) -> TextIO:
    """Return `stream`, or one on `copy` if it writes to the descriptor that is about to lead to the log."""
    try:
        redirected = stream.fileno() == descriptor
    except io.UnsupportedOperation:  # held in memory by a test
        redirected = False
    if not redirected:
        return stream
    return os.fdopen(copy, "w", buffering=1, encoding=stream.encoding, errors=stream.errors, closefd=False)


class _Messages(logging.Handler):
    """A logging handler that prints what the loggers of l2d_ray say on the user's stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record, without its level and origin."""
        say(self.format(record))

"""The progress of a pass over many things: a bar on a terminal, elsewhere a plain line every 30 seconds."""

import threading
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

from l2d_ray.distributed import screen

SECONDS_BETWEEN_LINES = 30.0
SHORT = 1.0
"""Seconds; a pass that took no longer leaves no line."""


class Progress:
    """A context manager that shows how far a pass is, also while nothing advances.

    It shows the number done, of how many, the rate and the time left. One line stays when the pass has ended without an
    error.
    """

    def __init__(self, total: int | None, label: str, unit: str = "") -> None:
        """`total` is None for a pass of which only the duration is known. `unit` is a plural noun."""
        self.done = 0
        self._total, self._label, self._unit, self._note = total, label, unit, ""
        self._started = self._resumed = time.monotonic()
        self._done_before = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_showing, daemon=True)

    def __enter__(self) -> Self:
        stream, form = screen.stderr(), None if self._total is not None else "{desc}: {elapsed}"
        self._bar = tqdm(
            total=self._total,
            desc=self._label,
            unit=self._unit,
            file=stream,
            bar_format=form,
            leave=False,
            disable=not stream.isatty(),
        )
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        self._bar.close()
        if error is None and time.monotonic() - self._started > SHORT:
            screen.say(self.line())

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more as done. `note`, such as a loss, is shown from now on."""
        self.done, self._note = self.done + count, note
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)

    def resume_at(self, done: int) -> None:
        """Count `done` as done earlier; the rate is that of what follows."""
        self.done = self._done_before = done
        self._resumed = time.monotonic()
        self._bar.reset()
        self._bar.initial = self._bar.n = done

    def line(self) -> str:
        """Return the state at this moment."""
        now = time.monotonic()
        passed = tqdm.format_interval(now - self._started)
        if self._total is None:
            return f"{self._label}: {passed}"
        rate = (self.done - self._done_before) / max(now - self._resumed, 1e-9)
        parts = [f"{self._label}: {self.done} of {self._total} {self._unit} in {passed}"]
        if rate:
            parts.append(f"{rate:,.0f} {self._unit}/s" if rate >= 100 else f"{rate:.2g} {self._unit}/s")
        if rate and self.done < self._total:
            parts.append(f"{tqdm.format_interval((self._total - self.done) / rate)} left")
        return ", ".join([*parts, self._note] if self._note else parts)

    def _keep_showing(self) -> None:
        wait = SECONDS_BETWEEN_LINES if self._bar.disable else 1.0
        while not self._ended.wait(wait):
            if self._bar.disable:
                screen.say(self.line())
            else:
                self._bar.refresh()

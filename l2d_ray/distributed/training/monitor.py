"""The driver's view of a training: messages of the workers become a progress bar, lines of text and tracked metrics.

A message is a line of text, or a dictionary with `step`, `samples`, `distinct_tokens` and `seconds` so far, and the
`metrics` of that step.
"""

import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty
from typing import Any

from ray.exceptions import RayError
from ray.util.queue import Queue

from l2d_ray.config import Config
from l2d_ray.distributed.progress import Progress
from l2d_ray.distributed.screen import say
from l2d_ray.stages.finetuning import settings_of
from l2d_ray.tracking import Tracker, log_to, open_trackers
from l2d_ray.workspace import Workspace

SILENCE = 60
"""Seconds without a first step after which the driver names the likely reasons."""


@contextmanager
def monitored(config: Config, workspace: Workspace, run: str, steps: int) -> Iterator[Queue]:
    """Yield a queue for messages of the workers, and show and track them until the block ends."""
    with _trackers(config, workspace, run) as trackers:
        queue = Queue(actor_options={"num_cpus": 0})
        monitor = Monitor(queue, trackers, steps)
        monitor.start()
        try:
            yield queue
        finally:
            monitor.stop()
            queue.shutdown()


class Monitor(threading.Thread):
    """A thread that shows and tracks the messages of a queue."""

    def __init__(self, queue: Queue, trackers: list[Tracker], steps: int) -> None:
        super().__init__(daemon=True)
        self._queue, self._trackers, self._steps = queue, trackers, steps
        self._ended, self._loss = threading.Event(), float("nan")
        self._first: tuple[float, dict[str, Any]] | None = None
        """Time and message at which the rates begin to count."""

    def stop(self) -> None:
        """Show what is still in the queue, and end; wait for that 30 seconds at most."""
        self._ended.set()
        self.join(timeout=30)

    def run(self) -> None:
        """Show messages until `stop`, or until the queue is lost with its node."""
        silent_until = time.monotonic() + SILENCE
        with Progress(self._steps, "fine-tuning", "steps") as bar:
            while not self._ended.is_set() or not self._queue.empty():
                try:
                    message = self._queue.get(timeout=0.5)
                except Empty:
                    if not self._first and time.monotonic() > silent_until:
                        say("no step yet: models are loaded, or wait for CPUs and GPUs (ray status)")
                        silent_until = float("inf")
                    continue
                except RayError:
                    break
                if isinstance(message, str):
                    say(message)
                else:
                    self._show(message, bar)
                    log_to(self._trackers, message["step"], message["metrics"])

    def _show(self, message: dict[str, Any], bar: Progress) -> None:
        if self._first is None or message["step"] < bar.done:  # the first, or the first after a lost worker
            self._first = time.monotonic(), message
            bar.resume_at(message["step"])
        started, first = self._first
        seconds = max(time.monotonic() - started, 1e-9)
        samples, tokens = ((message[key] - first[key]) / seconds for key in ("samples", "distinct_tokens"))
        self._loss = message["metrics"].get("loss", self._loss)
        note = f"loss {self._loss:.3f}, {samples:.1f} samples/s, {tokens:.0f} tokens/s"
        bar.advance(message["step"] - bar.done, note)


@contextmanager
def _trackers(config: Config, workspace: Workspace, run: str) -> Iterator[list[Tracker]]:
    """Yield the trackers of `finetune.trackers`; TensorBoard's files end up in the workspace, wherever it is."""
    name, local = config.finetune.name, workspace.is_local
    folder = Path(workspace.path(f"{name}/tensorboard")) if local else Path(tempfile.mkdtemp())
    trackers = open_trackers(config.finetune.trackers, f"{name}-{run}", folder, settings_of(config))
    try:
        yield trackers
    finally:
        for tracker in trackers:
            tracker.close()
        if not local:
            Workspace.open(str(folder)).copy("", workspace, f"{name}/tensorboard")
            shutil.rmtree(folder)

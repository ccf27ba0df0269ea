"""Several stages one after the other in one process: what they show on the screen."""

import time

from l2d_ray.data.dataset import Dataset
from l2d_ray.distributed.screen import say
from l2d_ray.schema import Split


class Titles:
    """Numbered titles of the stages of a run, with the time since it began."""

    def __init__(self, total: int) -> None:
        self._total, self._number, self._started = total, 0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the run began."""
        return round(time.monotonic() - self._started, 1)

    def show(self, title: str) -> None:
        """Show the title of the next stage."""
        self._number += 1
        minutes, seconds = divmod(int(self.seconds), 60)
        say(f"\n[{self._number}/{self._total}] {title} ({minutes}:{seconds:02})")


def describe(dataset: Dataset) -> None:
    """Show the size of a dataset."""
    samples = {split: dataset.num_samples(split) for split in (Split.TRAIN, Split.TEST)}
    say(f"{dataset.num_users:,} users, {samples[Split.TRAIN]:,} training samples, {samples[Split.TEST]:,} test samples")

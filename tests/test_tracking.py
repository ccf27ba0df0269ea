from collections.abc import Mapping

import pytest

from l2d_ray.tracking import Tracker, log_to


class Notebook:
    """A tracker that takes so many numbers."""

    def __init__(self, room: int) -> None:
        self.room, self.noted = room, list[tuple[int, Mapping[str, float]]]()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if len(self.noted) == self.room:
            raise ConnectionError("nobody is there")
        self.noted.append((step, metrics))

    def close(self) -> None:
        pass


def test_a_tracker_that_fails_is_dropped_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    small, large = Notebook(1), Notebook(9)
    trackers: list[Tracker] = [small, large]
    for step in range(3):
        log_to(trackers, step, {"loss": 1.0})
    assert trackers == [large]
    assert [step for step, _ in small.noted] == [0]
    assert [step for step, _ in large.noted] == [0, 1, 2]
    assert caplog.messages == ["Notebook takes no more numbers: nobody is there"]

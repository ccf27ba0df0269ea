"""Locust's load on the real application, over a real socket."""

from collections.abc import Iterator

import pytest
from support.live_endpoint import application, listening
from support.small_endpoint import LocalEngine

from l2d_ray.bench.load import load

PATH = "/v1/recommend"
BODIES = [{"history": ["i3"]}, {"history": ["i4", "i5"]}, {"history": ["nope"]}, {"history": ["i6"]}]


@pytest.fixture
def url(engine: LocalEngine) -> Iterator[str]:
    engine.failure, engine.delay = None, 0.0
    with listening(application(engine)) as address:
        yield address
    engine.delay = 0.0


def test_each_is_asked_once_and_the_first_takes_its_time_too(url: str, engine: LocalEngine) -> None:
    engine.delay = 0.5
    found = load(url, PATH, BODIES, seconds=None)
    assert found.statuses == {"200": 3, "422": 1}
    assert 1 < found.per_second < 2
    assert found.p50_ms >= 500


def test_a_slow_answer_does_not_delay_the_next_request(url: str, engine: LocalEngine) -> None:
    engine.delay = 1.5
    found = load(url, PATH, BODIES[:2], seconds=4, rate=10)
    assert found.rate == 10
    assert found.statuses.keys() == {"200"}
    assert found.statuses["200"] > 15  # of 40; one after the other, 3 would have been asked


def test_an_endpoint_that_answers_nothing_is_told(url: str) -> None:
    with pytest.raises(RuntimeError, match=r"answered no request: \['422'\]"):
        load(url, PATH, BODIES[2:3], seconds=None)

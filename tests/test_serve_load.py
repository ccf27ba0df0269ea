"""Load by Locust on the real application, over a real socket."""

from collections.abc import Iterator

import pytest
from support.live_endpoint import application, listening
from support.small_endpoint import LocalEngine

from l2d_ray.bench.load import load

PATH = "/v1/recommend"
BODIES = [{"history": ["i3"]}, {"history": ["i4", "i5"]}, {"history": ["nope"]}, {"history": ["i6"]}]


@pytest.fixture
def url(engine: LocalEngine) -> Iterator[str]:
    engine.reset()
    with listening(application(engine)) as address:
        yield address
    engine.reset()


def test_each_body_is_sent_once_and_the_time_of_the_first_counts(url: str, engine: LocalEngine) -> None:
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
    assert found.statuses["200"] > 15  # of 40; one after the other, only 3 would have been sent


def test_a_load_without_any_success_is_an_error(url: str) -> None:
    with pytest.raises(RuntimeError, match=r"/v1/recommend: answered no request with 200, but with \['422'\]"):
        load(url, PATH, BODIES[2:3], seconds=None)

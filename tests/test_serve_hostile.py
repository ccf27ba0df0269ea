"""Hostile requests over a real socket: whatever a client sends, the application answers, in words, and goes on."""

import os
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from live_endpoint import application, listening
from schemathesis import Case
from small_endpoint import LocalEngine

EXAMPLES = int(os.environ.get("L2D_RAY_HOSTILE_EXAMPLES", "20"))
"""Of each operation; and so many hundred raw requests."""


@pytest.fixture(scope="module")
def url(engine: LocalEngine) -> Iterator[str]:
    with listening(application(engine)) as address:
        yield address


@pytest.fixture(scope="module")
def described(url: str) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


schema = schemathesis.pytest.from_fixture("described")


@schema.parametrize()
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_answer_is_as_described(case: Case) -> None:
    case.call_and_validate()

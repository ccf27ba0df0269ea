"""The application against its OpenAPI description: Schemathesis sends valid and invalid requests."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import Status, events, from_schema
from support.hostile_requests import EXAMPLES
from support.live_endpoint import LIMITS, application, listening
from support.running_endpoint import ask
from support.small_endpoint import LocalEngine

KEY = "a-key"
FRAMING = {"connection", "content-length", "expect", "transfer-encoding", "upgrade"}


@pytest.fixture(scope="module")
def url(engine: LocalEngine) -> Iterator[str]:
    engine.reset()
    engine.beams = 2
    engine.offer("transitions")
    app = application(engine, LIMITS.model_copy(update={"beams": 2}), keys="DESCRIBED_KEYS")
    with pytest.MonkeyPatch.context() as patch, listening(app) as address:
        patch.setenv("DESCRIBED_KEYS", KEY)
        yield address


def with_limits(schema: dict[str, Any], engine: LocalEngine) -> dict[str, Any]:
    """Return the description with the known items and with the limits of the operator."""
    bodies = schema["components"]["schemas"]
    request = bodies["RecommendRequest"]["properties"]
    request["history"]["maxItems"] = LIMITS.max_history
    request["history"]["items"]["anyOf"][0]["enum"] = engine.catalogue.ids
    request["k"]["maximum"] = LIMITS.max_k
    request["unknown_items"]["enum"] = ["refuse"]
    request["explain"]["enum"] = [False]  # which items are explained depends on other fields
    request["recommender"]["enum"] = list(engine.recommenders)
    bodies["TitledItem"]["properties"]["title"]["maxLength"] = LIMITS.max_title_chars
    bodies["ItemIds"]["maxItems"] = LIMITS.max_filter_items
    bodies["BatchRequest"]["properties"]["requests"]["maxItems"] = LIMITS.max_batch
    return schema


def whole_numbers(value: Any) -> Any:
    """Return `value` with 27 for 27.0, which JSON Schema counts as an integer and the endpoint does not."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [whole_numbers(part) for part in value]
    return {key: whole_numbers(part) for key, part in value.items()} if isinstance(value, dict) else value


def without_framing(headers: Any) -> Any:
    """Return `headers` without those that frame the message: uvicorn refuses wrong ones before the application runs."""
    return headers and {name: value for name, value in headers.items() if name.lower() not in FRAMING}


@pytest.mark.parametrize("valid", [True, False], ids=["valid", "invalid"])
def test_every_response_is_as_described(url: str, engine: LocalEngine, valid: bool) -> None:
    schema = ask(url, "/openapi.json")[1]
    assert "/v1/beam_search" in schema["paths"]
    config = SchemathesisConfig.from_dict(
        {
            "seed": 1,
            "base-url": url,
            "continue-on-failure": True,
            "phases": {"examples": {"enabled": False}},  # the examples name items of another catalogue
            "auth": {"openapi": {"HTTPBearer": {"bearer": KEY}}},
            "generation": {
                "mode": "positive" if valid else "negative",
                "max-examples": EXAMPLES,
                "deterministic": True,
                "no-shrink": True,
                "database": "none",
            },
        }
    )
    described = schemathesis.openapi.from_dict(with_limits(schema, engine) if valid else schema, config=config)
    described.hook("map_body")(lambda context, body: whole_numbers(body))
    described.hook("map_headers")(lambda context, headers: without_framing(headers))
    statuses: Counter[int] = Counter()
    failures = []
    for event in from_schema(described).execute():
        assert not isinstance(event, events.NonFatalError | events.FatalError), event
        if isinstance(event, events.ScenarioFinished | events.FuzzScenarioFinished):
            recorder = event.recorder
            statuses.update(
                one.response.status_code for one in recorder.interactions.values() if one.response is not None
            )
            failures += [
                f"{recorder.label}: {check.failure_info.failure}\n{recorder.cases[case].value.as_curl_command()}"
                for case, checks in recorder.checks.items()
                for check in checks
                if check.status == Status.FAILURE and check.failure_info
            ]
    print(f"{dict(sorted(statuses.items()))} of {statuses.total()} responses")
    assert not failures, "\n\n".join(failures)
    assert (200 if valid else 422) in statuses

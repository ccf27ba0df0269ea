"""Outcomes that a gateway counts."""

import asyncio
import time
from types import SimpleNamespace

import pytest

from l2d_ray.distributed.serving.metrics import GatewayMetrics
from l2d_ray.serve.engine import OverloadedError


@pytest.mark.parametrize(
    ("seconds", "failure", "outcome"),
    [
        (0.0, asyncio.CancelledError, "cancelled"),
        (0.1, asyncio.CancelledError, "late"),
        (0.1, OverloadedError, "overloaded"),
        (0.0, ValueError, "failed"),
    ],
)
def test_a_cancelled_request_counts_as_late_only_at_its_deadline(
    seconds: float, failure: type[BaseException], outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[str] = []
    metrics = GatewayMetrics()
    monkeypatch.setattr(metrics, "_outcomes", SimpleNamespace(inc=lambda tags: counted.append(tags["outcome"])))

    def fail() -> None:
        with metrics.request("v", "recommend", deadline_seconds=0.1):
            time.sleep(seconds)
            raise failure

    with pytest.raises(failure):
        fail()
    assert counted == [outcome]

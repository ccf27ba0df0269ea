"""The right answers of an endpoint, computed by one process, and their comparison with its responses."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from l2d_ray.core.decoding import ScoredItems
from l2d_ray.core.query import Query
from support.running_endpoint import request
from support.small_endpoint import LocalEngine

BEAMS = 4
SINGLE = {
    "serve.layout": "distributed",
    "serve.shard_replicas": 2,
    "serve.shard_megabytes": 0.001,
    "serve.partial": True,
    "serve.max_waiting": 64,
    "serve.beams": BEAMS,
    "serve.recommender": "transitions",
}
"""Settings of an endpoint with one gateway and one encoder, two shard groups of two replicas each, and all others."""


def pairs_of(items: ScoredItems) -> list[tuple[str, float]]:
    """Return ids and scores of items, as the endpoint names them."""
    return [(f"i{item}", score) for item, score in zip(items.items_I.tolist(), items.scores_I.tolist(), strict=True)]


def check_items(answer: dict[str, Any], expected: ScoredItems) -> None:
    """Check the items of a response. Scores may differ in their last digits with the composition of a batch."""
    assert [item["item_id"] for item in answer["items"]] == [f"i{item}" for item in expected.items_I]
    np.testing.assert_allclose([item["score"] for item in answer["items"]], expected.scores_I, rtol=1e-3)


def check_answer(
    engine: LocalEngine,
    answer: dict[str, Any],
    history: Sequence[int | str],
    aggregation: str = "global",
    k: int = 10,
) -> None:
    """Check that a response has the items that the model and the index give in one process."""
    check_items(answer, engine.answer(Query.after(history, k, aggregation=aggregation)))


def check_beam_answer(engine: LocalEngine, answer: dict[str, Any], history: Sequence[int | str]) -> None:
    """Check that a response has the items of beam search in one process."""
    engine.beams = BEAMS
    expected = engine.beam_answer(Query.after(history, 10))
    assert len(expected) == BEAMS
    check_items(answer, expected)


def check_partial(engine: LocalEngine, answer: dict[str, Any]) -> None:
    """Check that a response names missing shards and has items of the others only."""
    assert answer["missing_shards"]
    present = [shard for number, shard in enumerate(engine.index.shards) if number not in answer["missing_shards"]]
    assert {int(item["item_id"][1:]) for item in answer["items"]} <= {
        int(i) for shard in present for i in shard.items_I
    }


def check_prompt_answer(url: str, engine: LocalEngine) -> None:
    """Check that a request is answered correctly within 5 seconds."""
    reply = request(url, "/v1/recommend", {"history": ["i1", "i2", "i3"], "k": 10})
    assert (reply.status, reply.seconds < 5) == (200, True)
    check_answer(engine, reply.body, [1, 2, 3])

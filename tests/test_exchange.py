"""Requests to shards, in one process and split over several."""

from collections.abc import Generator

import pytest

from l2d_ray.index.exchange import Exchange, Request, drive, partition, run


def scaled(shard: int, factor: int, term: int = 0) -> int:
    return shard * factor + term


def total(terms: list[int]) -> Exchange[int]:
    """Two rounds: the second sends each shard a number."""
    first = yield Request(scaled, (10,))
    second = yield Request(scaled, (1,), per_shard=terms)
    return sum(first) + sum(second)


def nothing_to_ask() -> Generator[Request, list, str]:
    return "done"
    yield


def test_shards_answer_in_their_order() -> None:
    assert Request(scaled, (2,)).answer([5, 7]) == [10, 14]
    assert Request(scaled, (2,), per_shard=[1, 3]).answer([5, 7]) == [11, 17]
    with pytest.raises(ValueError, match="shorter"):
        Request(scaled, (2,), per_shard=[1]).answer([5, 7])


def test_an_exchange_returns_its_result() -> None:
    assert run(total([100, 200, 300]), [1, 2, 3]) == 60 + 606
    assert run(nothing_to_ask(), [1]) == "done"


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_parts_of_a_request_answer_as_the_whole(parts: int) -> None:
    shards = [1, 2, 3, 4]
    groups = partition(len(shards), parts)
    assert [shard for group in groups for shard in group] == [0, 1, 2, 3]
    assert max(map(len, groups)) - min(map(len, groups)) <= 1

    def send(request: Request) -> list[int]:
        shares = zip(request.split(map(len, groups)), groups, strict=True)
        return [answer for share, group in shares for answer in share.answer([shards[n] for n in group])]

    assert drive(total([5, 6, 7, 8]), send) == run(total([5, 6, 7, 8]), shards)

"""Ray Data gives up on some tasks after a lost node, but not every time; so the error is made here."""

from collections.abc import Callable, Iterator

import pytest
from ray.exceptions import ActorUnavailableError, RayActorError

from l2d_ray.distributed.rounds import FRUITLESS, in_rounds

Run = Callable[[list[str]], Iterator[tuple[list[str], str]]]


def failing(rounds: list[list[str]], failures: int, preempted: bool = False) -> Run:
    """Return a pass that notes its pieces, and fails in the first rounds at the piece "deadly"."""

    def run(pieces: list[str]) -> Iterator[tuple[list[str], str]]:
        rounds.append(pieces)
        for piece in pieces:
            if piece == "deadly" and len(rounds) <= failures:
                raise RayActorError(preempted=True) if preempted else ActorUnavailableError("refused", None)
            yield [piece], piece.upper()

    return run


PIECES = {name: name for name in ("first", "deadly", "last")}


def test_the_remaining_pieces_start_again_and_nothing_is_repeated() -> None:
    rounds: list[list[str]] = []
    assert list(in_rounds(PIECES, failing(rounds, 2))) == ["FIRST", "DEADLY", "LAST"]
    assert rounds == [["first", "deadly", "last"], ["deadly", "last"], ["deadly", "last"]]


def test_a_piece_that_kills_all_its_workers_ends_the_job() -> None:
    rounds: list[list[str]] = []
    with pytest.raises(ActorUnavailableError):
        list(in_rounds(PIECES, failing(rounds, 100)))
    assert len(rounds) == 1 + FRUITLESS


def test_nodes_that_a_cloud_takes_back_do_not_end_the_job() -> None:
    rounds: list[list[str]] = []
    assert list(in_rounds(PIECES, failing(rounds, 20, preempted=True)))[-1] == "LAST"
    assert len(rounds) == 21

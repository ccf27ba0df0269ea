"""Recommenders that write text, with writers of known results: nothing here runs a model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from l2d_ray.config import Config
from l2d_ray.core.query import Query
from l2d_ray.recommenders.bigrec import popularity_weights
from l2d_ray.recommenders.grounded_beam import GroundedBeam, _scaled
from l2d_ray.recommenders.registry import find


class KnownWriter:
    """A writer that returns the same for every query, and counts its calls."""

    def __init__(self, written: Any) -> None:
        self.written, self.calls = written, 0

    def write(self, queries: Sequence[Query]) -> tuple[list[Any], int]:
        self.calls += 1
        return [self.written] * len(queries), 7 * len(queries)


def test_distances_are_scaled_to_0_and_1() -> None:
    assert _scaled(np.array([3.0, 1.0, 2.0])).tolist() == [1, 0, 0.5]
    assert _scaled(np.array([3.0, 3.0])).tolist() == [0, 0]


def test_bigrec_divides_distances_by_powers_of_popularity() -> None:
    counts = np.array([5, 1, 3, 1])
    np.testing.assert_allclose(popularity_weights(counts, 2.0), [4, 1, 2.25, 1])
    np.testing.assert_allclose(popularity_weights(counts, 0.0), 1)
    np.testing.assert_allclose(popularity_weights(np.array([2, 2]), 9.0), 1)
    writer = KnownWriter(np.array([1.0, 0.5, 0.8, 0.0]))
    orders = {0.0: [3, 1, 2, 0], 2.0: [3, 0, 2, 1]}
    for gamma, order in orders.items():
        (found,) = GroundedBeam(writer, popularity_weights(counts, gamma)).recommend([Query([9], 4)])
        assert found.items_I.tolist() == order
    np.testing.assert_allclose(found.scores_I, [np.inf, 4, 2.25 / 0.8, 2])


def test_values_of_a_study_share_what_is_written() -> None:
    shared, other = KnownWriter(np.array([0.0, 1.0])), KnownWriter(np.array([1.0, 0.0]))
    several = [GroundedBeam(writer, np.ones(2)) for writer in (shared, other, shared)]
    outcomes = GroundedBeam.run_all(several, [Query([9], 1), Query([9], 2, exclude=np.array([0]))])
    assert [[found.items_I.tolist() for found in outcome.lists] for outcome in outcomes] == [
        [[0], [1]],
        [[1], [1]],
        [[0], [1]],
    ]
    assert [outcome.tokens for outcome in outcomes] == [14, 14, 14]
    assert (shared.calls, other.calls) == (1, 1)


def test_a_model_that_writes_nothing_recommends_nothing() -> None:
    (found,) = GroundedBeam(KnownWriter(np.empty(0)), np.ones(2)).recommend([Query([9], 4)])
    assert len(found) == 0


@pytest.mark.parametrize(("name", "tuned", "stated"), [("bigrec", "gamma", 0.5)])
def test_a_name_without_a_number_leaves_it_to_validation(name: str, tuned: str, stated: float) -> None:
    options = find(name, Config(), "name").options
    (study,) = options.studies(Config())
    assert study.default in [getattr(trial, tuned) for trial in study.trials]
    assert getattr(options.chosen({name: {tuned: 0.25}}), tuned) == 0.25
    fixed = find(f"{name}-{stated}", Config(), "name").options
    assert (getattr(fixed, tuned), fixed.studies(Config()), fixed.chosen({})) == (stated, [], fixed)

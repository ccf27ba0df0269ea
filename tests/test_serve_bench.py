"""The simulated queue of the endpoint benchmark."""

import numpy as np
import pytest

from l2d_ray.bench.serve import queued


def test_the_simulated_queue_agrees_with_queueing_theory() -> None:
    """In an M/M/1 queue with mean service time 1, times in the system are exponential with mean 1 / (1 - load)."""
    service, load = np.random.default_rng(1).exponential(1.0, 200_000), 0.5
    totals = queued(service, load)
    assert np.mean(totals) == pytest.approx(2, rel=0.05)
    assert np.percentile(totals, 99) / np.percentile(totals, 50) == pytest.approx(np.log(100) / np.log(2), rel=0.05)
    assert min(np.subtract(totals, service)) == 0
    assert queued([1.0, 1.0], 1e-9) == [1.0, 1.0]

"""What the benchmark of the endpoint computes."""

import numpy as np
import pytest

from l2d_ray.bench.serve import queued


def test_a_queue_waits_as_long_as_queueing_theory_says() -> None:
    """M/M/1: at the rate `load` with service of mean 1, times are exponential with mean 1 / (1 - load)."""
    service, load = np.random.default_rng(1).exponential(1.0, 200_000), 0.5
    totals = queued(service, load)
    assert np.mean(totals) == pytest.approx(2, rel=0.05)
    assert np.percentile(totals, 99) / np.percentile(totals, 50) == pytest.approx(np.log(100) / np.log(2), rel=0.05)
    assert min(np.subtract(totals, service)) == 0
    assert queued([1.0, 1.0], 1e-9) == [1.0, 1.0]

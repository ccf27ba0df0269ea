"""The calibration of recommenders whose scores are probabilities, on test samples.

A prediction is that a listed item comes next. Of the items that were listed with probability p, a share of p should
have come next.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from l2d_ray.core.metrics import Reliability


@dataclass(frozen=True)
class Calibration:
    """The reliability of the predictions of one recommender."""

    listed: Reliability
    """The first 20 items of every sample."""
    first: Reliability
    """The first item of every sample, as for a classifier."""

    @classmethod
    def of(cls, ranks: pa.Table) -> "Calibration":
        """Compare probabilities with what came next, given the recommender's rows of `Evaluator.ranks`."""
        lists = ranks["log_probabilities"].combine_chunks()
        lengths_U, ranks_U = lists.value_lengths().to_numpy(), ranks["rank"].to_numpy()
        probabilities_N = np.exp(lists.flatten().to_numpy().astype(np.float64))
        place_N = np.arange(probabilities_N.size) - np.repeat(np.cumsum(lengths_U) - lengths_U, lengths_U)
        came_next_N = place_N == np.repeat(ranks_U, lengths_U)
        first_N = place_N == 0
        return cls(
            Reliability.of(probabilities_N, came_next_N), Reliability.of(probabilities_N[first_N], came_next_N[first_N])
        )

    def to_json(self) -> dict[str, Any]:
        """Return the calibration as the report has it."""
        bins = zip(*(values_B.tolist() for values_B in vars(self.listed).values()), strict=True)
        return {
            "expected_calibration_error": round(self.listed.error, 5),
            "expected_calibration_error_of_first": round(self.first.error, 5),
            "bins": [{"predicted": p, "observed": o, "predictions": n} for p, o, n in bins],
        }

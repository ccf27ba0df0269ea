"""The weight of old rows and samples: half of it is left after each half-life (`index.half_life_days`).

A row weighs 2^(-age / half-life), where its age is in whole days before the newest row. The weights at two moments
differ by one factor. So sums of weighted rows add up like others, after the older ones were scaled to the newer day.

A row's likelihood has its weight as the exponent (power prior: Ibrahim and Chen, Statistical Science 2000). Where n
rows counted, the sum of their weights counts. The weight of a row of more than about 1,000 half-lives is 0.

Shapes: N rows.
"""

from typing import overload

import numpy as np

from l2d_ray.core.arrays import Float64, IntArray
from l2d_ray.core.times import units_per_day

NO_DAY = int(np.iinfo(np.int64).min)
"""The newest day of no rows."""


def days_of(times_N: IntArray) -> IntArray:
    """Return the number of the day of each time, judged by the newest of them (`core.times`)."""
    days_N: IntArray = times_N // units_per_day(int(times_N.max(initial=0)))
    return days_N


@overload
def weights(days: int, newest_day: int, half_life_days: float) -> float: ...
@overload
def weights(days: IntArray, newest_day: int, half_life_days: float) -> Float64: ...
def weights(days: int | IntArray, newest_day: int, half_life_days: float) -> float | Float64:
    """Return the weights on the newest day of rows of some days; of a sum on one day, the factor that scales it."""
    found: Float64 = np.exp2((np.asarray(days, np.float64) - newest_day) / half_life_days)
    return found if found.ndim else float(found)

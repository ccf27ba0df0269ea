"""Array types that the package shares."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.floating]
"""float16, float32 or float64: memory rows and hidden states."""
Float64 = NDArray[np.float64]
"""Distances, scores and metrics."""
Integers = NDArray[np.integer]
"""Integers of any width."""
Amounts = NDArray[Any]
"""Numbers of rows or samples, or with a half-life the sums of their weights (`core.decay`)."""

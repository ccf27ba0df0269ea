"""Array types that the package shares."""

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating]
"""Floating point numbers of any width."""
Float64 = NDArray[np.float64]
Integers = NDArray[np.integer]
"""Integers of any width."""
IntArray = NDArray[np.int64]

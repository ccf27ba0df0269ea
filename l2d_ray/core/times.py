"""The unit of a dataset's timestamps."""

from l2d_ray.core.arrays import IntArray

SECONDS_PER_DAY = 86_400


def units_per_second(newest: int) -> int:
    """Return how many units of time make a second, judged by the newest timestamp of a dataset.

    Below 1e11 they are seconds, below 1e14 milliseconds, below 1e17 microseconds, above that nanoseconds. That is right
    for every moment from 1973 to 5138 since 1970, the start of Unix time. Other numbers pass for Unix seconds.
    """
    for units in (1, 1_000, 1_000_000):
        if abs(newest) < 10**11 * units:
            return units
    return 1_000_000_000


def units_per_day(newest: int) -> int:
    """Return how many units of time make a day (`units_per_second`)."""
    return SECONDS_PER_DAY * units_per_second(newest)


def refreshes(times: IntArray, refresh_days: int, newest: int) -> IntArray:
    """Return the time of the last refresh before each time, which may be that time itself.

    `newest` is the newest time of the dataset, which decides the unit.
    """
    period = refresh_days * units_per_day(newest)
    moments: IntArray = times // period * period
    return moments

"""Settings of what is erased, and of what is kept."""

from datetime import date

from pydantic import Field

from l2d_ray.config.section import File, Section


class EraseConfig(Section):
    """Erasure of users, items or a time, jobs/erase.py. l2d_ray/data/erasure.py has the rules."""

    users: File | None = None
    """File or URI with the ids of users to erase, one a line, whose whole histories go."""
    items: File | None = None
    """File or URI with the ids of items to erase, one a line. All interactions with them go."""
    before: date | None = None
    """Erase the interactions before this day (UTC)."""


class CompactConfig(Section):
    """Retention of snapshots and versions, jobs/compact.py."""

    keep_snapshots: int = Field(2, ge=1)
    """Number of memory snapshots to keep, the newest ones, each with its index and its version of the dataset."""
    keep_days: float = Field(7.0, ge=0)
    """Days for which a snapshot or a version of the dataset is kept after a newer one replaced it."""
    grace_hours: float = Field(24.0, ge=0)
    """Hours for which a file that no record names is kept, because a job may be about to name it. 0 is safe while no
    other job runs in the workspace."""

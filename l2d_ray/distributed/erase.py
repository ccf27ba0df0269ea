"""The erasure of users, items or a time from a workspace, on Ray: one task for each part of the data."""

from l2d_ray.config import Config
from l2d_ray.distributed.screen import say
from l2d_ray.distributed.tasks import run_tasks
from l2d_ray.stages import erasure
from l2d_ray.stages.erasure import EraseResult


def erase(config: Config) -> EraseResult:
    """Run jobs/erase.py, as `stages.erasure.erase` says."""
    result = erasure.erase(config, lambda label, step, calls: run_tasks(label, config, step, calls))
    say(
        f"{result.users:,} users, {result.samples:,} samples and {result.rows:,} rows of the memory are gone; to have"
        " them in no file, run jobs/compact.py, jobs/build_index.py, jobs/promote.py, and jobs/compact.py again with"
        " compact.keep_snapshots=1 compact.keep_days=0"
    )
    if result.unknown:
        say(f"{result.unknown} of the given ids are not in the dataset")
    if result.left:
        say(f"these hold samples of users, too; delete them or make them again: {', '.join(result.left)}")
    return result

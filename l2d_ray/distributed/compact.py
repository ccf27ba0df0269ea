"""The compaction of a workspace, on Ray: one task for each new unit of the memory."""

from l2d_ray.config import Config
from l2d_ray.distributed.screen import say
from l2d_ray.distributed.tasks import run_tasks
from l2d_ray.stages import compaction
from l2d_ray.stages.compaction import CompactResult


def compact(config: Config) -> CompactResult:
    """Run jobs/compact.py, as `stages.compaction.compact` says."""
    result = compaction.compact(config, lambda label, step, calls: run_tasks(label, config, step, calls))
    if result.pinned:
        say(
            f"snapshots {result.pinned} of the memory are kept, because their index was built last or is served; run"
            " jobs/build_index.py and jobs/promote.py, and compact again"
        )
    if result.holding_erased:
        say(
            f"{result.holding_erased} older snapshots and versions are kept for their readers, and hold what was"
            " erased; compact.keep_snapshots=1 compact.keep_days=0 removes them now"
        )
    return result

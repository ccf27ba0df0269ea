"""Erase users, items or a time from the dataset and the memory.

    python jobs/erase.py workspace=… erase.users=FILE [erase.items=FILE] [erase.before=YYYY-MM-DD]

A file has one id a line. l2d_ray/data/erasure.py says what becomes of histories and samples. The new version of the
dataset and the new snapshot of the memory are without what was erased; older files still have it. To have it in no
file, run jobs/compact.py, jobs/build_index.py, jobs/promote.py, and jobs/compact.py again with compact.keep_snapshots=1
compact.keep_days=0. Killed at any moment, the same command does the rest. The last line on stdout is one JSON object
(`EraseResult`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run(
        "l2d_ray.distributed.erase:erase",
        __doc__,
        reads="workspace erase workers",
        check="l2d_ray.stages.checks:erase",
        on_ray=False,
    )

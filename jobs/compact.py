"""Make the files of a workspace few again, and remove what is not kept.

    python jobs/compact.py workspace=… [key=value …]

Merges the generations of the dataset and the small units of the memory, and writes units again that lost rows
(jobs/erase.py). Removes older snapshots, their indexes and their versions of the dataset, but for those whose index was
built last or is served. Run it when the dataset has grown some times, or from time to time. Killed at any moment, the
same command does the rest. The last line on stdout is one JSON object (`CompactResult`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run(
        "l2d_ray.distributed.compact:compact",
        __doc__,
        reads="workspace compact workers",
        check="l2d_ray.stages.checks:compact",
        on_ray=False,
    )

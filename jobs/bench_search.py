"""Measure search against the size of a memory, in one process, without Ray.

    python jobs/bench_search.py [key=value …]

Needs no workspace: its rows are synthetic. The last line on stdout is one JSON object (`SearchBenchmark`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run(
        "l2d_ray.bench.search:bench_search",
        __doc__,
        reads="index recommend workers bench",
        on_ray=False,
    )

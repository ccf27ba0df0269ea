"""Run the benchmarks of jobs/benchmarks.yaml and write their figures into jobs/RESULTS.md.

    python jobs/bench_all.py workspace=SCRATCH [bench.only=extract,search]

Runs in the root of the repository. Hours if all run; killed at any moment, the same command goes on. The workspace
keeps every measurement. The last line on stdout is one JSON object (`BenchAllResult`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run(
        "l2d_ray.bench.results:bench_all",
        __doc__,
        reads="workspace bench.only",
        on_ray=False,
    )

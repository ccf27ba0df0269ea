"""Measure jobs/build_memory.py against a bare extraction loop.

    python jobs/bench_build.py workspace=SCRATCH [key=value …]

Needs a workspace with a prepared dataset and no memory. The last line on stdout is one JSON object (`BuildBenchmark`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run(
        "l2d_ray.bench.build:bench_build",
        __doc__,
        reads="workspace history prompt model memory workers finetune.name bench",
        check="l2d_ray.stages.checks:build_memory",
    )

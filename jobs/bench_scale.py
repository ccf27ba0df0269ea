"""Measure how jobs/build_memory.py scales: two workers against one, and 1, 10 and 100 times the samples.

    python jobs/bench_scale.py workspace=SCRATCH [bench.samples=400] [key=value …]

Needs a workspace with a prepared dataset. The last line on stdout is one JSON object (`ScaleBenchmark`), whose first
values are settings of jobs/plan_capacity.py.
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run(
        "l2d_ray.bench.scale:bench_scale",
        __doc__,
        reads="workspace history prompt model memory workers finetune.name bench",
        check="l2d_ray.stages.checks:build_memory",
        on_ray=False,
    )

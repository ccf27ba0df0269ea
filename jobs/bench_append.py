"""Measure a memory that grows: ten appends of 1%, each until it is served, next to a rebuild of everything.

    python jobs/bench_append.py workspace=SCRATCH [bench.samples=100000] [model.num_layers=10] [key=value …]

Needs Locust (`pip install locust`). The interactions are synthetic; the model is that of the settings. The last line on
stdout is one JSON object (`AppendBenchmark`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run(
        "l2d_ray.bench.append:bench_append",
        __doc__,
        reads="workspace history prompt model memory index recommend workers serve bench",
        serves=True,
    )

"""Measure the HTTP endpoint under load.

    python jobs/bench_serve.py workspace=… [key=value …]

Needs an index (jobs/build_index.py) and Locust (`pip install locust`). The last line on stdout is one JSON object
(`ServeBenchmark`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run(
        "l2d_ray.bench.serve:bench_serve",
        __doc__,
        reads="workspace history prompt model finetune.name memory.num_shards index recommend workers serve bench",
        check="l2d_ray.serve.releases:Release.plan",
        serves=True,
    )

"""Load the endpoint: `python jobs/bench_serve.py --config FILE [key=value …]`, with a workspace that has an index.

Needs Locust (`pip install locust`). The last line on stdout is one JSON object (`ServeBenchmark`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run("l2d_ray.bench.serve:bench_serve", serves=True)

"""Measure search against the size of a memory: `python jobs/bench_search.py [key=value …]`.

Made-up rows, no workspace, one process, no Ray; `bench.*` are its settings. The last line on stdout is one JSON object
(`SearchBenchmark`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run("l2d_ray.bench.search:bench_search", on_ray=False)

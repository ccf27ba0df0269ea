"""Measure packed against one-by-one extraction: `python jobs/bench_extract.py [--config FILE] [key=value …]`.

Needs a prepared dataset (jobs/prepare_data.py). One process, no Ray. The last line on stdout is one JSON object
(`ExtractBenchmark`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run("l2d_ray.bench.extract:bench_extract", on_ray=False)

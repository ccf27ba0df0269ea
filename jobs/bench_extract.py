"""Measure packed against one-by-one extraction, in one process, without Ray.

    python jobs/bench_extract.py workspace=… [key=value …]

Needs a dataset (jobs/prepare_data.py). The last line on stdout is one JSON object (`ExtractBenchmark`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run(
        "l2d_ray.bench.extract:bench_extract",
        __doc__,
        reads="workspace history prompt model memory workers bench",
        on_ray=False,
    )

"""Measure tree-packed training against one-by-one, and two workers against one.

    python jobs/bench_finetune.py workspace=… [key=value …]

Needs a dataset (jobs/prepare_data.py). The last line on stdout is one JSON object (`FinetuneBenchmark`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run(
        "l2d_ray.bench.finetune:bench_finetune",
        __doc__,
        reads="workspace history prompt model finetune workers bench",
        check="l2d_ray.stages.checks:finetune",
    )

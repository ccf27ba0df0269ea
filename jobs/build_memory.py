"""Build the memory: the hidden state of every training sample.

    python jobs/build_memory.py workspace=… [key=value …]
    ray job submit --working-dir . -- python jobs/build_memory.py workspace=s3://bucket/beauty

Needs a dataset (jobs/prepare_data.py). The model, the prompt and the window are those of jobs/finetune.py, if that has
run. Killed at any moment, the same command builds what is missing. After the dataset grew (data.append=true), it builds
the new samples; a new snapshot has old and new units. The last line on stdout is one JSON object
(`BuildResult`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run(
        "l2d_ray.distributed.build_memory:build_memory",
        __doc__,
        reads="workspace history prompt model finetune.name memory workers",
        check="l2d_ray.stages.checks:build_memory",
        on_ray=False,
    )

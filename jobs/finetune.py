"""Fine-tune the language model on the training samples.

    python jobs/finetune.py workspace=… model.name=… [key=value …]
    ray job submit --working-dir . -- python jobs/finetune.py workspace=s3://bucket/beauty …

Needs a dataset (jobs/prepare_data.py). Killed at any moment, the same command continues from the last checkpoint. The
last line on stdout is one JSON object (`FinetuneResult`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run(
        "l2d_ray.distributed.training.driver:finetune",
        __doc__,
        reads="workspace history prompt model finetune workers",
        check="l2d_ray.stages.checks:finetune",
        on_ray=False,
    )

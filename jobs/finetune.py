"""Fine-tune the language model: `python jobs/finetune.py --config FILE [key=value …]`.

The same under `ray job submit --working-dir . -- python jobs/finetune.py …`. Killed at any moment, the same command
again goes on from the last checkpoint. The last line on stdout is one JSON object (`FinetuneResult`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run("l2d_ray.distributed.training.driver:finetune")

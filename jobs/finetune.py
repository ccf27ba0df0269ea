"""Fine-tune the language model on the training samples; `--help` lists the settings.

The last line on stdout is one JSON object (`FinetuneResult`).
"""

from l2d_ray.distributed.finetune import finetune
from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run(finetune)

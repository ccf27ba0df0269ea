"""Train a recommender to compare L2D with: sasrec, esasrec, gru4rec, alpharec, id-head or lite-llm4rec.

    python jobs/train.py workspace=… recommender=sasrec [key=value …]
    python jobs/evaluate.py workspace=… evaluate.recommenders=sasrec,l2d-global

Needs a dataset (jobs/prepare_data.py). The last three use the language model; id-head also needs a memory
(jobs/build_memory.py). Killed at any moment, the same command continues from the last complete epoch.
The last line on stdout is one JSON object (`TrainResult`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run(
        "l2d_ray.distributed.train:train",
        __doc__,
        reads="workspace recommender train recommend.exclude_seen model history prompt index.snapshot"
        " finetune.method finetune.rank finetune.alpha finetune.dropout finetune.target_modules"
        " workers.cpus workers.gpus workers.tokens_per_chunk",
        check="l2d_ray.stages.checks:train",
        on_ray=False,
    )

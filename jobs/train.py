"""Train a recommender to compare L2D with: sasrec, esasrec, gru4rec, or alpharec, which reads titles by a model.

    python jobs/train.py workspace=… recommender=sasrec [key=value …]
    python jobs/evaluate.py workspace=… evaluate.recommenders=sasrec,l2d-global

Needs a dataset (jobs/prepare_data.py). Killed at any moment, the same command continues from the last complete epoch.
The last line on stdout is one JSON object (`TrainResult`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run(
        "l2d_ray.distributed.train:train",
        __doc__,
        reads="workspace recommender train model recommend.exclude_seen workers.cpus workers.gpus",
        check="l2d_ray.stages.checks:train",
        on_ray=False,
    )

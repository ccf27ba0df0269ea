"""Search for the best settings of a recommender by NDCG@20 on validation samples, with Ray Tune.

    python jobs/tune.py workspace=… recommender=sasrec [key=value …]
    python jobs/train.py --config WORKSPACE/reports/tune-sasrec.yaml workspace=…

Tries settings of the grid in the recommender's module; one that is given stays as it is. Needs a dataset. Killed at any
moment, the same command goes on. Leaves reports/tune-<recommender>.json, with all trials, and .yaml, with the best
settings. The last line on stdout is one JSON object (`TuneResult`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run(
        "l2d_ray.distributed.tune:tune",
        __doc__,
        reads="workspace recommender train tune recommend.exclude_seen model history prompt index.snapshot"
        " finetune.method finetune.rank finetune.alpha finetune.dropout finetune.target_modules workers",
        check="l2d_ray.stages.checks:tune",
        on_ray=False,
    )

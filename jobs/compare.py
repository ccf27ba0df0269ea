"""Compare recommenders on one data set, from the raw data to the tables.

    python jobs/compare.py --config jobs/configs/movielens-100k.yaml workspace=…

Prepares the data, fine-tunes the model unless model.adapter is given, builds the memory and the index, trains what
needs training, and evaluates evaluate.recommenders. What the workspace has is taken as it is; killed at any moment, the
same command goes on. Leaves reports/<evaluate.name>.md: accuracy with intervals, groups of targets, cost, the ratio of
evaluate.reference to each other recommender, and the search that each was allowed. The last line on stdout is one JSON
object (`CompareResult`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run(
        "l2d_ray.distributed.compare:compare",
        __doc__,
        reads="workspace data history prompt model finetune memory index recommend train tune evaluate compare workers",
        check="l2d_ray.stages.checks:compare",
    )

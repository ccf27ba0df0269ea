"""Evaluate recommenders on the test samples, and print a table.

    python jobs/evaluate.py workspace=… [key=value …]

Needs a dataset, and for L2D a memory. Indexes that are missing are built, and the weights of fusions are fitted. With
evaluate.memory=fresh, L2D also needs the rows of validation and test samples, which are computed into held-out/. Leaves
reports/<evaluate.name>.json, .png and .parquet in the workspace. The last line on stdout is one JSON object
(`EvaluateResult`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run(
        "l2d_ray.distributed.evaluate:evaluate",
        __doc__,
        reads="workspace history prompt model finetune.name memory.num_shards index recommend evaluate workers",
        check="l2d_ray.stages.checks:evaluate",
    )

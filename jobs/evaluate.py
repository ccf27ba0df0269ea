"""Evaluate recommenders on the test samples: `python jobs/evaluate.py --config FILE [key=value …]`.

`evaluate.recommenders` names them; indexes that are missing are built. Leaves reports/<evaluate.name>.json, .png and
.parquet in the workspace and prints the table. The last line on stdout is one JSON object (`EvaluateResult`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run("l2d_ray.distributed.evaluate:evaluate")

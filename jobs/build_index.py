"""Build the index of a memory, and make it the one to recommend from.

    python jobs/build_index.py workspace=… [key=value …]

Needs a memory (jobs/build_memory.py). The parameters of the recommender `l2d` are fitted on validation samples, with
the model of the memory. index.* and recommend.* are recorded: jobs/evaluate.py, jobs/serve.py and l2d_ray.load take
them from the workspace. If the memory grew, only its new rows are indexed (l2d_ray/stages/index_growth.py). Killed at
any moment, the same command builds what is missing. The last line on stdout is one JSON object (`IndexResult`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run(
        "l2d_ray.distributed.build_index:build_index",
        __doc__,
        reads="workspace history prompt model finetune.name memory.num_shards index recommend workers",
        check="l2d_ray.stages.checks:build_index",
        on_ray=False,
    )

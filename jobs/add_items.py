"""Add items to a workspace that is served, without interactions: they are recommended by their titles.

    python jobs/add_items.py workspace=… data.items=new.csv [key=value …]
    RAY_ADDRESS=… python jobs/promote.py workspace=…

Needs an index (jobs/build_index.py). The file has the ids and titles of the new items, and may have known items, too.
The aggregation `posterior` recommends new items from the next promotion on; the others rank items with interactions.
Recommenders that jobs/train.py trained must be trained again. Killed at any moment, the same command continues, and the
same file again adds nothing. The last line on stdout is one JSON object (`AddItemsResult`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run(
        "l2d_ray.distributed.add_items:add_items",
        __doc__,
        reads="workspace data.items data.columns data.max_title_words history prompt model finetune.name"
        " memory.num_shards index recommend workers",
        check="l2d_ray.stages.checks:add_items",
        on_ray=False,
    )

"""Prepare a dataset: raw interactions and items in, histories with their splits out. Or let it grow.

    python jobs/prepare_data.py
    python jobs/prepare_data.py data.source=movielens data.interactions=ml-1m
    python jobs/prepare_data.py data.source=amazon data.interactions=Beauty_5.json.gz data.items=meta_Beauty.json.gz
    python jobs/prepare_data.py data.source=table data.interactions=s3://bucket/log/ data.items=items.parquet
    python jobs/prepare_data.py workspace=shop data.append=true data.interactions=today.parquet

The last line on stdout is one JSON object: users, items, interactions, samples, train, valid, test, dropped (by
reason), seconds, dataset. With data.append=true: version, the totals, what is new, refused (by reason), changed_titles.
A dataset that was prepared with data.split=none can grow, and jobs/build_memory.py then runs the new samples alone.
Killed at any moment, the same command goes on; the same files again change nothing.
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run(
        "l2d_ray.distributed.prepare:prepare_or_append",
        __doc__,
        reads="workspace data",
        check="l2d_ray.stages.checks:prepare",
    )

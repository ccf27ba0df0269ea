"""Plan hardware, hours, money, storage and requests of a memory and its index, before anything is built.

    python jobs/plan_capacity.py --config FILE [workspace=…] workers.max=8 capacity.dollars_per_worker_hour=2

Prints what the plan follows from. Sizes and rates that are not given are read from the workspace's dataset and measured
on this machine. The last line on stdout is one JSON object (`CapacityPlan`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run(
        "l2d_ray.bench.capacity:plan_capacity",
        __doc__,
        reads="capacity workspace history prompt model memory index workers serve.shard_replicas bench.samples",
        on_ray=False,
    )

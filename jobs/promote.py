"""Serve another index, memory or adapter in place of what an endpoint serves, without a request failing.

    RAY_ADDRESS=… python jobs/promote.py workspace=… [key=value …]

Takes the settings of jobs/serve.py; index.snapshot=N rolls back to an earlier memory. The recommenders next to L2D stay
the same, with their newest weights. RAY_ADDRESS names the endpoint's Ray, as jobs/serve.py prints it. The last line
on stdout is one JSON object (`PromoteResult`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run(
        "l2d_ray.distributed.serving.promotion:promote",
        __doc__,
        reads="workspace history prompt model finetune.name memory.num_shards index recommend workers",
        check="l2d_ray.serve.releases:Release.plan",
    )

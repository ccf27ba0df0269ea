"""Serve a newer index, snapshot or adapter in place of what an endpoint serves, without a request failing.

`python jobs/promote.py --config FILE [key=value …]`, with the settings that jobs/serve.py would take; the settings of
before roll it back. RAY_ADDRESS names the endpoint's Ray. The last line on stdout is one JSON object (`PromoteResult`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run("l2d_ray.distributed.serving.promotion:promote")

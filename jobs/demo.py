"""`make demo`: every stage on MovieLens-100k and SmolLM2-135M, on this machine, and one user's recommendations.

The last line on stdout is one JSON object (`DemoResult`).
"""

import sys

from l2d_ray.distributed.demo import demo
from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run(lambda config: demo(config, sys.argv[1:]), on_ray=False)

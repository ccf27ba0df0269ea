"""Script that prints the totals of the encoders on the Ray of the environment, for `Running.counts`."""

import json

import ray

from l2d_ray.distributed.serving.promotion import encoder_counts

if __name__ == "__main__":
    ray.init(log_to_driver=False)
    try:
        print(json.dumps(encoder_counts()))
    finally:
        ray.shutdown()

"""Build the memory of hidden states: `python jobs/build_memory.py --config FILE [key=value …]`.

The same under `ray job submit --working-dir . -- python jobs/build_memory.py …`. Killed at any moment, the same
command again builds what is missing. The last line on stdout is one JSON object (`BuildResult`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run("l2d_ray.distributed.build_memory:build_memory")

"""Build the index of a memory: `python jobs/build_index.py --config FILE [key=value …]`.

The space, the FAISS index and the snapshot are `index.*`. Killed at any moment, the same command again builds what is
missing. The last line on stdout is one JSON object (`IndexResult`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run("l2d_ray.distributed.build_index:build_index")

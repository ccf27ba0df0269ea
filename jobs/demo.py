"""`make demo`: every stage on MovieLens-100k and SmolLM2-135M, on this machine, and one user's recommendations.

The last line on stdout is one JSON object (`DemoResult`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run("l2d_ray.distributed.demo:demo", on_ray=False)

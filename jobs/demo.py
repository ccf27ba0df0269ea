"""Run every stage on MovieLens-100k and SmolLM2-135M, on this machine, and recommend to one user.

    make demo

The last line on stdout is one JSON object (`DemoResult`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run(
        "l2d_ray.distributed.demo:demo",
        __doc__,
        reads="workspace data history prompt model finetune memory index recommend evaluate workers",
        on_ray=False,
    )

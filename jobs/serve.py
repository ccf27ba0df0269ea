"""Answer recommendations over HTTP, until Ctrl-C.

    python jobs/serve.py workspace=… [key=value …]

Needs an index (jobs/build_index.py). On a cluster, `serve deploy cluster/serve.yaml` starts the same application. The
last line on stdout is one JSON object (`ServeResult`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run(
        "l2d_ray.distributed.serving.endpoint:serve_until_stopped",
        __doc__,
        reads="workspace history prompt model finetune.name memory.num_shards index recommend workers serve",
        check="l2d_ray.serve.releases:Release.plan",
        serves=True,
    )

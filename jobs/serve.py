"""Answer recommendations over HTTP, until Ctrl-C.

`python jobs/serve.py workspace=… [key=value …]` needs a workspace with an index. On a cluster, `serve deploy
cluster/serve.yaml` starts the same application. The last line on stdout is one JSON object (`ServeResult`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run("l2d_ray.distributed.serving.endpoint:serve_until_stopped", serves=True)

"""Measure packed extraction against other engines, each in a separate virtual environment.

    python jobs/bench_peers.py workspace=… 'bench.peers={"vllm": "/tmp/vllm/bin/python"}' [key=value …]

Runs in the root of the repository; jobs/peers/NAME_states.py says how to install an engine. Needs a dataset
(jobs/prepare_data.py). The last line on stdout is one JSON object (`PeerBenchmark`).
"""

from l2d_ray.distributed.job import run

if __name__ == "__main__":
    run(
        "l2d_ray.bench.peers:bench_peers",
        __doc__,
        reads="workspace history prompt model memory workers bench",
        on_ray=False,
    )

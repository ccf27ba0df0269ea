"""A Ray cluster with a real autoscaler in a namespace of its processes and network, and jobs on it.

    unshare --fork --pid --mount-proc --net --kill-child python tests/support/autoscaling_cluster.py JSON

The head has no CPUs. Nodes are raylets on this machine, which Ray's fake provider starts for the autoscaler. The last
line on stdout is one JSON object.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

HEAD = "f" * 51 + "00000"
IDLE_MINUTES = 0.25
SPOT = {"ray.io/market-type": "spot"}
NODE_TYPES = {
    "ray.head.default": {"resources": {"CPU": 0}, "max_workers": 0},
    "spot": {"resources": {"CPU": 1}, "max_workers": 3, "labels": SPOT},
    "on-demand": {"resources": {"CPU": 1}, "max_workers": 3},
}
ADDRESS = "127.0.0.1:6379"
SOON_DEAD = {"health_check_period_ms": 1000, "health_check_failure_threshold": 5}
"""System settings of Ray with which a lost node is noticed after 5 seconds instead of half a minute."""


def cluster_config() -> dict[str, Any]:
    """Return a configuration of Ray's cluster launcher for nodes on this machine."""
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "head_node_id": HEAD,
        "gcs_address": ADDRESS,
    }
    switches = ["use_node_id_as_ip", "disable_node_updaters", "disable_launch_config_check", "launch_multiple"]
    commands = ["setup", "initialization", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray"]
    return {
        "cluster_name": "test",
        "max_workers": 6,
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": provider | dict.fromkeys(switches, True),
        "available_node_types": {
            name: {"min_workers": 0, "node_config": {}, **kind} for name, kind in NODE_TYPES.items()
        },
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        **{f"{command}_commands": [] for command in commands},
    }


def start_head() -> None:
    """Start the head in a folder for this cluster alone, and prepare the environment for its jobs."""
    folder = Path(tempfile.mkdtemp(prefix="autoscaling-", dir="/tmp"))
    config = folder / "cluster.json"
    config.write_text(json.dumps(cluster_config()))
    os.environ |= {
        "HOME": str(folder),
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    ray = str(Path(sys.executable).parent / "ray")
    options = ["--num-cpus=0", "--object-store-memory=100000000", "--node-ip-address=127.0.0.1"]
    options += [f"--system-config={json.dumps(SOON_DEAD)}"]
    subprocess.run(
        [ray, "start", "--head", *options, f"--temp-dir={folder / 'ray'}", f"--autoscaling-config={config}"],
        env=os.environ | {"RAY_CLOUD_INSTANCE_ID": HEAD, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD},
        check=True,
        stdout=sys.stderr,
    )
    os.environ["RAY_ADDRESS"] = ADDRESS


def nodes() -> dict[str, psutil.Process]:
    """Return the raylets of the nodes that the autoscaler has started, by the id of the node."""
    found = {}
    for process in psutil.process_iter():
        try:
            if process.name() == "raylet" and process.status() != psutil.STATUS_ZOMBIE:
                node = process.environ().get("RAY_CLOUD_INSTANCE_ID", HEAD)
                if node != HEAD:
                    found[node] = process
        except psutil.Error:  # it has ended
            continue
    return found


def actors(name: str) -> list[psutil.Process]:
    """Return the processes of the actors of a class."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if f"ray::{name}" in " ".join(process.info["cmdline"] or [])
    ]


class Watch:
    """Seconds since the start, and waiting."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self.times: dict[str, float] = {}

    def wait(self, event: str, condition: Callable[[], bool], job: subprocess.Popen[str] | None = None) -> None:
        """Wait until the condition holds, and note when. Fail after 5 minutes, or if the job ends."""
        deadline = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < deadline, f"{event}: not in time; {self.times}"
            assert job is None or job.poll() is None, f"{event}: the job ended; {job.communicate()}"
            time.sleep(0.1)
        self.note(event)

    def note(self, event: str) -> None:
        """Note when something happened."""
        self.times[event] = round(time.monotonic() - self._started, 1)
        print(event, self.times[event], file=sys.stderr, flush=True)


def submit(job: list[str]) -> subprocess.Popen[str]:
    """Submit a job to the cluster. What it prints goes to stdout."""
    ray = str(Path(sys.executable).parent / "ray")
    command = [ray, "job", "submit", "--address=http://127.0.0.1:8265", "--", sys.executable, *job]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def main(units: str, build: list[str], impossible: list[str]) -> dict[str, Any]:
    """Submit a build, lose one of its three nodes, and wait for its end and that of its nodes.

    Another job, for whose workers there is no node, runs at the same time.
    """
    watch = Watch()
    job, refused = submit(build), subprocess.Popen([sys.executable, *impossible], stderr=subprocess.PIPE, text=True)

    def committed() -> int:
        return len(list(Path(units).glob("*.json")))

    def three_workers() -> bool:
        for actor in actors("MapWorker"):  # they wait for each other, or two could finish before the third starts
            actor.suspend()
        return len(nodes()) == 3 and len(actors("MapWorker")) == 3

    watch.wait("first unit", lambda: committed() > 0, job)
    watch.wait("3 workers", three_workers, job)
    node, raylet = next(iter(nodes().items()))
    for process in [*raylet.children(recursive=True), raylet]:
        process.kill()
    watch.note("node killed")
    before = committed()
    watch.wait("3 workers again", lambda: node not in nodes() and three_workers(), job)
    for actor in actors("MapWorker"):
        actor.resume()
    output, _ = job.communicate(timeout=300)
    watch.note("job ended")
    watch.wait("no nodes", lambda: not nodes())
    _, errors = refused.communicate(timeout=60)
    return {
        "status": job.returncode,
        "output": output,
        "committed": before,
        "seconds": watch.times,
        "refused": {"status": refused.returncode, "errors": errors.splitlines()},
        "started": re.findall(r"Adding (\d+) node\(s\) of type (\S+)\.", monitor_log()),
    }


def monitor_log() -> str:
    """Return what the autoscaler has logged."""
    return (Path(os.environ["HOME"]) / "ray/session_latest/logs/monitor.log").read_text()


if __name__ == "__main__":
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    start_head()
    print(json.dumps(main(**json.loads(sys.argv[1]))))

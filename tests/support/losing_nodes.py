"""Every stage on a cluster of several nodes that loses one in the middle of it.

    python tests/support/losing_nodes.py FOLDER STAGE …

The head has no CPUs. The other nodes have two each, and another one joins for each that is lost. The last line on
stdout is one JSON object: what each stage left, and its seconds.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from l2d_ray.distributed import build_index, build_memory, evaluate
from l2d_ray.distributed.job import quiet_ray_data
from l2d_ray.distributed.serving.endpoint import endpoint
from l2d_ray.distributed.serving.haproxy import free_ports
from l2d_ray.distributed.training import driver
from l2d_ray.distributed.training.driver import finetune
from l2d_ray.memory.store import MemoryStore
from l2d_ray.workspace import Workspace
from support.autoscaling_cluster import SOON_DEAD
from support.small_training import LEARNING, wait_for_checkpoint
from support.small_workspace import command, config_of, environment, wait_for

HEAD = {"num_cpus": 0, "include_dashboard": False, "_system_config": SOON_DEAD}
UNITS = {"memory.units": 60, "workers.max": 4}
FACTORY = {"index.factory": "IVF4,Flat", "workers.max": 2}
TRAINING = LEARNING | {
    "workers.max": 2,
    "workers.cpus": 2,
    "finetune.checkpoint_minutes": 0.01,
    "finetune.samples": 100,
    "finetune.trackers": "[]",
}
EVALUATION = FACTORY | {
    "evaluate.recommenders": '["most-popular","l2d-local"]',
    "evaluate.batch_size": 4,
    "evaluate.samples": 100,
    "evaluate.fractions": "[]",
    "evaluate.top_m": "[5]",
}
SERVING = {"serve.encoders": 2, "serve.gateways": 2, "serve.shard_replicas": 2, "workers.max": 2}
QUESTION = {"history": ["i1", "i2", "i3"], "k": 5}


class SeveralNodes:
    """A head without CPUs and two nodes."""

    def __init__(self) -> None:
        self._cluster = Cluster(initialize_head=True, head_node_args=HEAD)
        self._nodes = [self._cluster.add_node(num_cpus=2, wait=False) for _ in range(2)]
        self._cluster.wait_for_nodes()
        self.address = self._cluster.address
        self.lost = 0

    def oldest_raylet(self) -> psutil.Process:
        """Return the process that manages the oldest node."""
        return psutil.Process(self._nodes[0].all_processes["raylet"][0].process.pid)

    def lose(self) -> None:
        """Kill the oldest node with its workers, and add another one."""
        kill_with_children(self.oldest_raylet().pid)
        node = self._nodes.pop(0)
        self._cluster.remove_node(node, allow_graceful=False)
        self._nodes.append(self._cluster.add_node(num_cpus=2, wait=False))
        self.lost += 1


def kill_with_children(pid: int) -> None:
    """Kill a process and its descendants, as a lost machine does."""
    try:
        process = psutil.Process(pid)
        for one in [*process.children(recursive=True), process]:
            one.kill()
    except psutil.NoSuchProcess:
        return


def head(folder: Path, nodes: SeveralNodes) -> dict[str, Any]:
    """Start to build the memory as another process, until some units are committed. The caller kills everything."""
    job = command("build_memory", folder, **UNITS)
    process = subprocess.Popen(job, env=environment() | {"RAY_ADDRESS": nodes.address}, stdout=subprocess.DEVNULL)
    wait_for(lambda: len(committed(folder)) >= 3 or process.poll() is not None)
    print(json.dumps({"ended": process.poll()}), flush=True)
    process.wait()
    return {}


def memory(folder: Path, nodes: SeveralNodes) -> dict[str, Any]:
    """Build the memory, and lose a node once the first records have arrived."""
    before, run, left = committed(folder), build_memory._run, 0

    def disturbed(*arguments: Any) -> Iterator[Any]:
        nonlocal left
        for number, record in enumerate(run(*arguments)):
            yield record
            if number == 1 and not nodes.lost:
                nodes.lose()
                left = UNITS["memory.units"] - len(committed(folder))

    build_memory._run = disturbed
    result = build_memory.build_memory(config_of(folder, **UNITS))
    kept = {name: changed for name, changed in committed(folder).items() if name in before}
    return {"before": len(before), "left": left, "reused": result.units_reused, "committed_again": kept != before}


def zombie(folder: Path, nodes: SeveralNodes) -> dict[str, Any]:
    """Build the memory at the URI in WORKSPACE; lose a node whose worker goes on, while another repeats its unit."""
    config = config_of(folder, **UNITS | {"memory.units": 12, "workspace": os.environ["WORKSPACE"]})
    results: list[build_memory.BuildResult] = []
    thread = threading.Thread(target=lambda: results.append(build_memory.build_memory(config)))
    thread.start()
    store = MemoryStore(Workspace.open(os.environ["UNDISTURBED"]))
    wait_for(lambda: len(store.units()) >= 2)
    raylet = nodes.oldest_raylet()
    workers = [worker for worker in raylet.children(recursive=True) if "UnitActor" in " ".join(worker.cmdline())]
    raylet.kill()
    left = 12 - len(store.units())
    _, alive = psutil.wait_procs(workers, timeout=1)
    zombies = sum(worker.status() != psutil.STATUS_ZOMBIE for worker in alive)
    psutil.wait_procs(workers, timeout=60)
    nodes.lose()
    thread.join()
    return {"left": left, "zombies": zombies, "rows": results[0].rows}


def committed(folder: Path) -> dict[str, int]:
    """Return when each unit was committed."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "memory" / "units").glob("*.json")}


def index(folder: Path, nodes: SeveralNodes) -> dict[str, Any]:
    """Build the index; lose a node with a task that builds a shard, and one with shards that are tuned."""
    build_shard, drive = build_index.build_shard, build_index.drive

    def slow(*arguments: Any) -> Any:
        time.sleep(4)
        return build_shard(*arguments)

    def disturbed(steps: Any, send: Callable[[Any], Any]) -> Any:
        sent: list[Any] = []

        def send_and_lose(request: Any) -> Any:
            sent.append(request)
            if len(sent) == 2:
                nodes.lose()
            return send(request)

        return drive(steps, send_and_lose)

    build_index.build_shard, build_index.drive = slow, disturbed
    threading.Timer(2, nodes.lose).start()
    result = build_index.build_index(config_of(folder, **FACTORY))
    build_index.build_shard, build_index.drive = build_shard, drive
    return {"manifest": result.index, "rows": result.rows}


def evaluation(folder: Path, nodes: SeveralNodes) -> dict[str, Any]:
    """Evaluate, and lose a node once the first ranks have arrived."""
    progress = evaluate.Progress

    class Losing(progress):  # type: ignore[misc, valid-type]
        def advance(self, *arguments: Any, **named: Any) -> None:
            if not self.done:
                nodes.lose()
            super().advance(*arguments, **named)

    evaluate.Progress = Losing
    evaluate.evaluate(config_of(folder, **EVALUATION))
    return {}


def training(folder: Path, nodes: SeveralNodes) -> dict[str, Any]:
    """Train with one worker, then with a worker on each of two nodes, of which one is lost.

    Each block of Ray Data holds several steps.
    """
    other = folder.parent / "training"
    shutil.copytree(folder / "dataset", other / "dataset")
    driver.MAX_BLOCKS = 8
    settings = TRAINING | {"model.name": folder / "model"}
    finetune(config_of(other, **settings, **{"finetune.name": "one", "workers.max": 1}))
    two = config_of(other, **settings, **{"finetune.name": "two", "finetune.zero_stage": 2})
    thread = threading.Thread(target=lambda: finetune(two))
    thread.start()
    wait_for_checkpoint(other)
    nodes.lose()
    thread.join()
    return {}


def serving(folder: Path, nodes: SeveralNodes) -> dict[str, Any]:
    """Serve two replicas of everything, and ask before and after a node is lost."""
    from support.running_endpoint import ask

    def items() -> list[str]:
        status, body = ask(url, "/v1/recommend", QUESTION)
        return [item["item_id"] for item in body["items"]] if status == 200 else []

    (port,) = free_ports(1)
    with endpoint(config_of(folder, **SERVING, **{"serve.port": port})) as url:
        before, answers = items(), []
        nodes.lose()
        lost = time.monotonic()
        while time.monotonic() < lost + 10 or (time.monotonic() < lost + 60 and answers[-5:] != [before] * 5):
            answers.append(items())
            time.sleep(0.5)
    return {"before": before, "after": answers}


STAGES = {
    "head": head,
    "memory": memory,
    "zombie": zombie,
    "index": index,
    "evaluation": evaluation,
    "training": training,
    "serving": serving,
}


def main(folder: Path, stages: list[str]) -> dict[str, Any]:
    """Run these stages, one after the other on the same cluster, and return what each left."""
    results: dict[str, Any] = {}
    nodes = SeveralNodes()
    ray.init(address=nodes.address, log_to_driver=False)
    quiet_ray_data()
    for stage in stages:
        started, lost = time.monotonic(), nodes.lost
        results[stage] = STAGES[stage](folder, nodes)
        results[stage] |= {"seconds": round(time.monotonic() - started, 1), "lost": nodes.lost - lost}
        print(stage, results[stage], file=sys.stderr, flush=True)
    ray.shutdown()
    return results


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2:])))

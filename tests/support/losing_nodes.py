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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from l2d_ray.config import Config
from l2d_ray.distributed import build_index as index_job
from l2d_ray.distributed import evaluate as evaluate_job
from l2d_ray.distributed.build_memory import build_memory
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
        self.lost, self.lost_at = 0, 0

    def oldest_raylet(self) -> psutil.Process:
        """Return the process that manages the oldest node."""
        return psutil.Process(self._nodes[0].all_processes["raylet"][0].process.pid)

    def lose(self) -> None:
        """Kill the oldest node with its workers, and add another one. Works in the main thread only."""
        kill_with_children(self.oldest_raylet().pid)
        self.lost_at = time.time_ns()
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


@contextmanager
def running(stage: Callable[[Config], Any], config: Config) -> Iterator[tuple[threading.Thread, list[Any]]]:
    """Run a stage in another thread while the block runs, and wait for its end; yield the list that gets its result."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(stage(config)))
    thread.start()
    yield thread, results
    thread.join()


def memory(folder: Path, nodes: SeveralNodes) -> dict[str, Any]:
    """Build the memory, and lose a node once two more units are committed."""
    before = committed(folder)
    with running(build_memory, config_of(folder, **UNITS)) as (thread, results):
        wait_for(lambda: len(committed(folder)) >= len(before) + 2 or not thread.is_alive())
        nodes.lose()
    after = committed(folder)
    left = sum(changed > nodes.lost_at for changed in after.values())
    changed = {name: after[name] for name in before} != before
    return {"before": len(before), "left": left, "reused": results[0].units_reused, "committed_again": changed}


def zombie(folder: Path, nodes: SeveralNodes) -> dict[str, Any]:
    """Build the memory at the URI in WORKSPACE; lose a node whose worker goes on, while another repeats its unit."""
    config = config_of(folder, **UNITS | {"memory.units": 12, "workspace": os.environ["WORKSPACE"]})
    store = MemoryStore(Workspace.open(os.environ["UNDISTURBED"]))
    with running(build_memory, config) as (thread, results):
        wait_for(lambda: len(store.units()) >= 2 or not thread.is_alive())
        raylet = nodes.oldest_raylet()
        workers = [worker for worker in raylet.children(recursive=True) if "UnitActor" in " ".join(worker.cmdline())]
        raylet.kill()
        left = 12 - len(store.units())
        _, alive = psutil.wait_procs(workers, timeout=1)
        zombies = sum(worker.status() != psutil.STATUS_ZOMBIE for worker in alive)
        psutil.wait_procs(workers, timeout=60)
        nodes.lose()
    return {"left": left, "zombies": zombies, "rows": results[0].rows}


def committed(folder: Path) -> dict[str, int]:
    """Return when each unit was committed."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "memory" / "units").glob("*.json")}


def index(folder: Path, nodes: SeveralNodes) -> dict[str, Any]:
    """Build the index; lose a node with a task that builds a shard, and one with shards that are tuned."""
    build_shard, drive = index_job.build_shard, index_job.drive
    sent: list[Any] = []
    tuning, lost = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        time.sleep(4)
        return build_shard(*arguments)

    def disturbed(steps: Any, send: Callable[[Any], Any]) -> Any:
        def send_and_lose(request: Any) -> Any:
            sent.append(request)
            if len(sent) == 2:
                tuning.set()
                lost.wait()
            return send(request)

        return drive(steps, send_and_lose)

    index_job.build_shard, index_job.drive = slow, disturbed
    with running(index_job.build_index, config_of(folder, **FACTORY)) as (thread, results):
        wait_for(lambda: any(folder.glob("index/*/*/fitted.json")) or not thread.is_alive())
        time.sleep(2)
        nodes.lose()
        wait_for(lambda: tuning.is_set() or not thread.is_alive())
        nodes.lose()
        lost.set()
    index_job.build_shard, index_job.drive = build_shard, drive
    return {"manifest": results[0].index, "rows": results[0].rows}


def evaluation(folder: Path, nodes: SeveralNodes) -> dict[str, Any]:
    """Evaluate, and lose a node once the first ranks have arrived."""
    progress, before = evaluate_job.Progress, nodes.lost

    class Losing(progress):  # type: ignore[misc, valid-type]
        def advance(self, *arguments: Any, **named: Any) -> None:
            if nodes.lost == before:
                nodes.lose()
            super().advance(*arguments, **named)

    evaluate_job.Progress = Losing
    evaluate_job.evaluate(config_of(folder, **EVALUATION))
    return {}


def training(folder: Path, nodes: SeveralNodes) -> dict[str, Any]:
    """Train with one worker, then with a worker on each of two nodes, of which one is lost.

    Each block of Ray Data holds several steps.
    """
    other = folder.parent / "training"
    shutil.copytree(folder / "dataset", other / "dataset")
    driver.MAX_BLOCKS = 8
    settings = TRAINING | {"model.name": folder / "model"}
    finetune(config_of(other, **settings | {"finetune.name": "one", "workers.max": 1}))
    with running(finetune, config_of(other, **settings | {"finetune.name": "two", "finetune.zero_stage": 2})):
        wait_for_checkpoint(other)
        nodes.lose()
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

"""Every stage on one small workspace, as the jobs run them: a script, for test_workspace_alone.py.

The last line on stdout is one JSON object: the settings that each job read, and what it returned.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

import l2d_ray
from l2d_ray.command_line import load_config
from l2d_ray.distributed.ray_settings import KEEP_IDLE_WORKERS, set_local_variables
from l2d_ray.distributed.serving.haproxy import free_ports
from support.recorded_reads import VARIABLE, install, recorded
from support.running_endpoint import ask
from support.tiny_models import save_tiny

FINETUNING = ["epochs=1", "batch_size=16", "micro_batch_size=8", "valid_samples=12"]
EVALUATION = ["recommenders=[most-popular,l2d-global,l2d-local]", "fractions=[1.0]", "batch_size=16"]
EVALUATION += ["top_m=[50]", "priors=[1.5]"]  # one value each: validation has nothing to choose
HISTORY = ["i3", "i7", "i11"]


def write_raw_files(folder: Path) -> list[str]:
    """Write interactions and items as tables, and return the settings that name them."""
    rows = [f"u{user},i{(user * 7 + step * 3) % 30},{step}" for user in range(40) for step in range(12)]
    (folder / "log.csv").write_text("\n".join(["uid,iid,ts", *rows]))
    (folder / "items.csv").write_text("\n".join(["item_id,title", *(f"i{n},Title {n} of the year" for n in range(30))]))
    columns = {"user": "uid", "item": "iid", "timestamp": "ts", "id_in_items": "item_id"}
    files = [f"data.interactions={folder}/log.csv", f"data.items={folder}/items.csv", "data.split=leave-one-out"]
    return ["data.source=table", *files, *(f"data.columns.{key}={name}" for key, name in columns.items())]


def main(folder: Path) -> dict[str, Any]:
    """Run the jobs one after the other, each with as few settings as a user needs to give."""
    workspace, model = folder / "workspace", save_tiny(folder / "model")
    found: dict[str, Any] = {}

    def run(job: str, stage: Callable[[Any], Any], *settings: str) -> None:
        config = load_config([f"workspace={workspace}", *settings])
        recorded()
        result = stage(config)
        found[job] = {"reads": sorted(recorded()), "result": result}

    def fields(stage: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
        return lambda config: dataclasses.asdict(stage(config))

    from l2d_ray.distributed.build_index import build_index
    from l2d_ray.distributed.build_memory import build_memory
    from l2d_ray.distributed.evaluate import evaluate
    from l2d_ray.distributed.prepare import prepare
    from l2d_ray.distributed.serving.endpoint import endpoint
    from l2d_ray.distributed.serving.promotion import promote
    from l2d_ray.distributed.training.driver import finetune

    one = "workers.max=1"
    run("prepare_data", fields(prepare), *write_raw_files(folder))
    training = [f"finetune.{setting}" for setting in FINETUNING]
    run("finetune", fields(finetune), f"model.name={model}", "history.stride=4", "prompt.suffix=Next:", one, *training)
    run("build_memory", fields(build_memory), "memory.units=2", "memory.num_shards=2", one)
    run("build_index", fields(build_index), "index.prior=1.5", one)
    run("evaluate", fields(evaluate), *(f"evaluate.{setting}" for setting in EVALUATION), one)
    port, other = f"serve.port={free_ports(1).pop()}", "transitions"
    served = load_config([f"workspace={workspace}", port, f"serve.recommender={other}"])
    recorded()
    with endpoint(served) as url:
        answers = [
            ask(url, "/v1/recommend", {"history": HISTORY, "k": 5, "recommender": name}) for name in ("l2d", other)
        ]
        found["serve"] = {"reads": sorted(recorded()), "result": answers}
        run("promote", fields(promote))
    loaded = [l2d_ray.load(workspace, recommender=name) for name in ("l2d", other)]
    items = [[dataclasses.asdict(item) for item in one.recommend(HISTORY, k=5)] for one in loaded]
    found["load"] = {"reads": sorted(recorded()), "result": items, "settings": loaded[0].config.given()}
    return found


if __name__ == "__main__":
    target = Path(sys.argv[1])
    set_local_variables()
    os.environ |= {VARIABLE: str(target / "reads"), "PYTHONPATH": os.pathsep.join(sys.path)}
    install()
    hook = {"worker_process_setup_hook": "support.recorded_reads.install"}
    ray.init(
        "local",
        num_cpus=5,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env=hook,
        _system_config=KEEP_IDLE_WORKERS,
    )
    try:
        found = main(target)
    finally:
        ray.shutdown()
    print(json.dumps(found))  # after Ray's last message

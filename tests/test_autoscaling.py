"""jobs/build_memory.py on a cluster with a real autoscaler. `pytest -s` prints when what happened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.small_workspace import build_units, command, config_of, expected_ids, states_of, write_dataset

from l2d_ray.data.dataset import Dataset
from l2d_ray.memory.store import MemoryStore
from l2d_ray.memory.verify import verify
from l2d_ray.workspace import Workspace

NAMESPACE = ["unshare", "--fork", "--pid", "--mount-proc", "--net", "--kill-child"]
ALLOWED = os.geteuid() == 0 and subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.skipif(not ALLOWED, reason="a namespace for the cluster needs root"),
]
SETTINGS = {"memory.units": 40, "workers.max": "null"}
CLUSTER = Path(__file__).parent / "support/autoscaling_cluster.py"


def test_a_build_grows_from_no_node_to_three_loses_one_and_leaves_none(tmp_path: Path) -> None:
    """Only nodes with the label start, and a job with workers that no node can hold is refused at the same time."""
    folder, local, other = (tmp_path / name for name in ("cluster", "local", "other"))
    for one in (folder, local, other):
        write_dataset(one, users=120)
    _, *build = command("build_memory", folder, **SETTINGS, **{"workers.labels": "ray.io/market-type=spot"})
    _, *impossible = command("build_memory", other, **{"workers.gpus": 1})
    arguments = {"units": str(folder / "memory/units"), "build": build, "impossible": impossible}
    process = subprocess.run(
        [*NAMESPACE, sys.executable, CLUSTER, json.dumps(arguments)], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout.splitlines()[-1])
    print(found["seconds"])
    assert found["status"] == 0, found["output"]
    result = json.loads(next(line for line in found["output"].splitlines() if line.startswith('{"samples"')))
    assert 0 < found["committed"] < result["units"] == 40
    assert sum(int(count) for count, kind in found["started"]) >= 4
    assert {kind for _, kind in found["started"]} == {"spot"}
    assert_same_memory(folder, local)
    assert found["refused"]["status"] == 2
    *_, line = found["refused"]["errors"]
    assert line.startswith("error: workers.cpus=1, workers.gpus=1: the cluster's autoscaler can start no node for such")
    assert not (other / "memory").exists()


def assert_same_memory(folder: Path, local: Path) -> None:
    """Assert that the memory has the bytes of one that this process builds in `local`."""
    settings = SETTINGS | {"model.name": folder / "model"}
    build_units(config_of(local, **settings))
    dataset, store = Dataset.open(Workspace.open(str(local))), MemoryStore(Workspace.open(str(local)))
    store.take_snapshot(store.units(), dataset.digest, 1.0)
    ours, theirs = states_of(folder), states_of(local)
    assert sorted(ours) == sorted(theirs) == expected_ids(folder)
    for sample, state in ours.items():
        np.testing.assert_array_equal(state, theirs[sample])
    assert verify(Workspace.open(str(folder))).problems == []

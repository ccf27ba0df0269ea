"""Fine-tuning whose driver or worker is killed, and checkpoints of other trainings."""

import json
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
from support.small_training import LEARNING, USERS, assert_same, wait_for_checkpoint, weights
from support.small_workspace import command, config_of, environment_of_cluster, kill_worker, wait_for, workers

from l2d_ray.data.dataset import Dataset
from l2d_ray.distributed.training.driver import finetune, identify_run
from l2d_ray.errors import InputError
from l2d_ray.workspace import Workspace

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def users() -> int:
    return USERS


LONG = LEARNING | {
    "finetune.checkpoint_steps": 3,
    "finetune.keep_checkpoints": 1,
    "finetune.epochs": 3,
    "finetune.patience": 3,
    "finetune.dropout": 0.1,
}


@pytest.fixture(scope="module")
def interrupted(dataset: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """Return a workspace whose training was killed with its driver."""
    folder = tmp_path_factory.mktemp("interrupted")
    shutil.copytree(dataset, folder, dirs_exist_ok=True)
    job, silent = command("finetune", folder, **LONG), subprocess.DEVNULL
    process = subprocess.Popen(job, env=environment_of_cluster(), stdout=silent, stderr=silent)
    wait_for_checkpoint(folder)
    process.kill()
    process.wait()
    wait_for(lambda: not workers("RayTrainWorker"))  # they write for some seconds more
    assert not (folder / "adapter" / "training.json").exists()
    return folder


def test_a_checkpoint_of_another_training_is_refused(interrupted: Path, ray_session: None) -> None:
    dataset = Dataset.open(Workspace.open(str(interrupted)))
    ours, other = (config_of(interrupted, **LONG | {"finetune.rank": rank}) for rank in (8, 4))
    folders = [interrupted / "checkpoints" / identify_run(one, dataset) for one in (ours, other)]
    folders[0].rename(folders[1])
    with pytest.raises(
        InputError, match=r"belongs to another model or configuration; delete its folder in checkpoints/"
    ):
        finetune(other)
    folders[1].rename(folders[0])


def test_a_killed_training_resumes_to_the_weights_of_an_uninterrupted_one(
    interrupted: Path, folder: Path, ray_session: None
) -> None:
    """The first training loses its driver, while it lists a checkpoint, and then a worker.

    The other one loses the queue of its progress bar.
    """
    noted = next((interrupted / "checkpoints").glob("*/checkpoint_manager_snapshot.json"))
    before = {folder.name for folder in noted.parent.glob("checkpoint_*/")}
    noted.write_text(noted.read_text()[:-20])
    training = threading.Thread(target=lambda: finetune(config_of(interrupted, **LONG)))
    training.start()
    wait_for(lambda: bool({*re.findall(r"checkpoint_\d[^\"]*", noted.read_text())} - before))
    kill_worker("RayTrainWorker")
    assert not (interrupted / "adapter" / "training.json").exists()
    training.join()
    wait_for(lambda: not workers("_QueueActor"))  # of this training
    whole = threading.Thread(target=lambda: finetune(config_of(folder, **LONG | {"finetune.max_failures": 0})))
    whole.start()
    wait_for(lambda: bool(workers("_QueueActor")))
    kill_worker("_QueueActor")
    seen = [0]
    while whole.is_alive():
        seen.append(len(list((folder / "checkpoints").glob("*/checkpoint_*/"))))
        time.sleep(0.01)
    assert 1 <= max(seen) <= 3  # of eight: the newest, one being written, one being deleted
    assert_same(weights(interrupted), weights(folder))
    ours, theirs = (json.loads((one / "adapter" / "training.json").read_text()) for one in (interrupted, folder))
    for key in ("samples", "distinct_tokens", "tokens_one_by_one", "best_epoch"):
        assert ours[key] == theirs[key]
    assert len(ours["losses"]) == 3
    for one, other in zip(ours["losses"], theirs["losses"], strict=True):
        assert one == pytest.approx(other)

"""A training resumes from a checkpoint only if that is of the same training."""

import json
from pathlib import Path

import pytest

from l2d_ray.distributed.training.checkpoints import OWNER, check_owner
from l2d_ray.errors import InputError
from l2d_ray.workspace import Workspace


def write_owner(folder: Path, number: int, text: str) -> None:
    checkpoint = folder / f"checkpoints/ours/checkpoint_{number}"
    checkpoint.mkdir(parents=True)
    (checkpoint / OWNER).write_text(text)


def test_the_newest_checkpoint_decides_who_may_resume(tmp_path: Path) -> None:
    """A kill truncated the newest file."""
    workspace = Workspace.open(str(tmp_path))
    check_owner(workspace, "ours", workers=1, zero_stage=3)
    write_owner(tmp_path, 1, json.dumps({"run": "another", "workers": 1}))
    write_owner(tmp_path, 2, json.dumps({"run": "ours", "workers": 3}))
    write_owner(tmp_path, 3, "{")
    check_owner(workspace, "ours", workers=3, zero_stage=3)
    check_owner(workspace, "ours", workers=2, zero_stage=0)
    with pytest.raises(InputError, match=r"checkpoint_2: holds ZeRO shards of 3 workers, which 2 cannot load; set"):
        check_owner(workspace, "ours", workers=2, zero_stage=3)
    (tmp_path / "checkpoints/ours").rename(tmp_path / "checkpoints/theirs")
    with pytest.raises(InputError, match=r"checkpoint_2: belongs to another model or configuration; delete its folder"):
        check_owner(workspace, "theirs", workers=3, zero_stage=0)

"""Checkpoints in the workspace: their places, whose they are, and repair of Ray Train's list of them."""

from pathlib import Path

from l2d_ray.distributed.training.ray_private import CHECKPOINT_LIST, list_of_one
from l2d_ray.errors import InputError
from l2d_ray.workspace import Workspace

FOLDER = "checkpoints"
"""Folder of the workspace with one folder for each unfinished training."""
OWNER = "owner.json"
"""File of a checkpoint: the training (`run`) and the number of `workers` that wrote it."""


def run_folder(run: str) -> str:
    """Return the folder of a training's checkpoints in the workspace."""
    return f"{FOLDER}/{run}"


def best_folder(run: str, epoch: int) -> str:
    """Return the folder, in the workspace, of the weights of the best epoch so far."""
    return f"{run_folder(run)}/best-{epoch}"


def check_owner(workspace: Workspace, run: str, workers: int, zero_stage: int) -> None:
    """Raise InputError if a number of workers cannot resume this training from what its folder holds."""
    for file in reversed(workspace.files(run_folder(run), suffix=f"/{OWNER}")):
        try:
            owner = workspace.read_json(file)
        except InputError:  # truncated by a kill: no training resumes from this checkpoint
            continue
        checkpoint = workspace.path(file).removesuffix(f"/{OWNER}")
        if owner["run"] != run:
            raise InputError(f"{checkpoint}: belongs to another model or configuration; delete its folder in {FOLDER}/")
        if zero_stage and owner["workers"] != workers:
            raise InputError(
                f"{checkpoint}: holds ZeRO shards of {owner['workers']} workers, which {workers} cannot load; set"
                f" workers.min={owner['workers']} and workers.max={owner['workers']}, or delete its folder in {FOLDER}/"
            )
        return


def repair_list(workspace: Workspace, run: str) -> None:
    """Repair Ray Train's list of a training's checkpoints after a kill or a full disk truncated it.

    The new list holds one checkpoint, from which training resumes to the same weights. It is the last but one, because
    a part of the last one may be missing.
    """
    folder = run_folder(run)
    path = f"{folder}/{CHECKPOINT_LIST}"
    if not workspace.exists(path):
        return
    try:
        workspace.read_json(path)
    except InputError:
        entries = (Path(file).relative_to(folder).parts for file in workspace.files(folder))
        names = sorted({entry[0] for entry in entries if len(entry) > 1 and entry[0].startswith("checkpoint_")})
        if names:
            workspace.write_json(path, list_of_one(names[-2:][0]))
        else:
            workspace.delete(path)

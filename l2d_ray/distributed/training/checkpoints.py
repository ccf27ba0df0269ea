"""What Ray Train itself does not get over when a training is begun again."""

import json
from pathlib import Path

from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
    _CheckpointManagerState,
    _TrainingResultState,
)

from l2d_ray.errors import InputError
from l2d_ray.workspace import Workspace


def mend_list(workspace: Workspace, folder: str) -> None:
    """Make Ray Train's list of the checkpoints in `folder` whole again, which a kill or a full disk may have cut off.

    The new list has one checkpoint, from which training goes on to the same weights: the last but one, for of the last
    one a part may be missing, too.
    """
    path = f"{folder}/{CHECKPOINT_MANAGER_SNAPSHOT_FILENAME}"
    if not workspace.exists(path):
        return
    try:
        workspace.read_json(path)
    except InputError:
        entries = (Path(file).relative_to(folder).parts for file in workspace.files(folder))
        names = sorted({entry[0] for entry in entries if len(entry) > 1 and entry[0].startswith("checkpoint_")})
        if not names:
            workspace.delete(path)
            return
        kept = _TrainingResultState(checkpoint_dir_name=names[-2:][0], metrics={})
        state = _CheckpointManagerState(
            checkpoint_results=[kept],
            checkpoint_report_indices=[0],
            latest_checkpoint_result=kept,
            pending_training_results=[],
            pending_validation_specs=[],
            current_report_index=1,
            validated_checkpoint_dir_names=[],
            timed_out_validation_checkpoint_dir_names=[],
            failed_validation_checkpoint_dir_names=[],
        )
        workspace.write_json(path, json.loads(state.json()))

"""Private names of Ray Train that training uses, as seen in Ray 2.60.0. Another version may lack any of them."""

import json
from typing import Any

from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME as CHECKPOINT_LIST
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
    _CheckpointManagerState,
    _TrainingResultState,
)

__all__ = ["CHECKPOINT_LIST", "list_of_one"]


def list_of_one(checkpoint: str) -> dict[str, Any]:
    """Return the content of Ray Train's list of checkpoints, the file CHECKPOINT_LIST, with one entry.

    `checkpoint` is the name of a folder next to that file.
    """
    entry = _TrainingResultState(checkpoint_dir_name=checkpoint, metrics={})
    state = _CheckpointManagerState(
        checkpoint_results=[entry],
        checkpoint_report_indices=[0],
        latest_checkpoint_result=entry,
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=1,
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
    content: dict[str, Any] = json.loads(state.json())
    return content

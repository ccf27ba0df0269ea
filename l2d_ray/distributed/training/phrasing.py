"""Samples to tokens, ahead of the workers that train on them.

Several of Ray's own processes import this module, so it imports transformers, which takes seconds, only when needed.
"""

from typing import Any

import numpy as np
import ray

from l2d_ray.config import Config
from l2d_ray.prompts import PromptEncoder
from l2d_ray.stages.finetuning import SamplePhraser, SampleTable, pack


def sample_phraser(config: Config, titles: list[str], table: SampleTable) -> SamplePhraser:
    """Return a phraser of the samples of `table` for the model of `config`, without reading the model's weights."""
    from l2d_ray.models.backbone import context_length, load_tokenizer, read_architecture
    from l2d_ray.models.checkpoint import find_model

    checkpoint = find_model(config.model)
    prompts = PromptEncoder(config.prompt, load_tokenizer(checkpoint), titles)
    return SamplePhraser(table, prompts, context_length(read_architecture(checkpoint, config.model)))


class PhraserActor:
    """A SamplePhraser as a callable for Ray Data: row numbers in, rows of `finetuning.pack` out."""

    def __init__(self, config: dict[str, Any], titles: list[str], table: Any, micro_batches: int) -> None:
        """Read the tokenizer. `table` is a reference to a SampleTable; a worker has `micro_batches` in each step."""
        self._phraser, self._micro_batches = sample_phraser(Config(**config), titles, ray.get(table)), micro_batches

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """Phrase one worker's part of several steps, from `step` on.

        `samples` holds the row numbers of all its micro-batches; `bounds` says where the second and later ones start.
        """
        parts = np.split(row["samples"], row["bounds"])
        steps = (parts[start : start + self._micro_batches] for start in range(0, len(parts), self._micro_batches))
        return [
            pack(row["step"] + number, [self._phraser.phrase(part) for part in step])
            for number, step in enumerate(steps)
        ]

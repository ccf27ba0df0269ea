"""Hidden states of prompts: the last layer's state at the last token of each.

Two functions compute the same states. `packed_states` runs every distinct token once (`core/packing.py`); given a
`PrefixCache`, it also skips the beginnings of prompts that earlier batches ran. `padded_states` runs padded batches, as
research code does. It is the reference, and it serves architectures whose attention cannot be replaced.

Shapes: N prompts, D hidden size.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from l2d_ray.core.arrays import IntArray
from l2d_ray.core.packing import Prompts, plan_forest, skip_known, split_chunks
from l2d_ray.models import tree_attention
from l2d_ray.models.backbone import DTYPES, Backbone
from l2d_ray.models.prefix_cache import PrefixCache, Segment, length

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2, "int8": 1e-2}
"""Largest `relative_error` by which packed and padded states may differ, by dtype."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HiddenStates:
    """The hidden states of a batch of prompts."""

    states: Tensor
    """[N, D] float32, on the CPU."""
    tokens: int
    """Tokens that went through the model."""


class Extractor(Protocol):
    """A function from prompts to their hidden states."""

    def __call__(self, prompts: Prompts, boundaries: Sequence[IntArray] | None = None) -> HiddenStates:
        """Compute the states of `prompts`. The cache, if any, is used only with the `boundaries` of each prompt."""


def extractor(backbone: Backbone, tokens_per_chunk: int, cache: PrefixCache | None = None) -> Extractor:
    """Return `packed_states` for this model if a trial run gives the right states, else `padded_states`.

    Only `packed_states` uses `cache`.
    """
    trial = Prompts.join([np.array(tokens, np.int32) for tokens in ([5, 6, 7, 8], [5, 6, 9], [5, 6, 7])])
    expected = padded_states(backbone, trial, batch_size=1).states
    error = trial_error(lambda: packed_states(backbone, trial, tokens_per_chunk=4).states, expected)
    if error < TOLERANCE[backbone.dtype]:
        return lambda prompts, boundaries=None: packed_states(backbone, prompts, tokens_per_chunk, cache, boundaries)
    logger.warning("%s cannot run packed (error %.1e); using padded batches", type(backbone.model).__name__, error)
    return lambda prompts, boundaries=None: padded_states(backbone, prompts, batch_size=16)


def trial_error(packed: Callable[[], Tensor], expected: Tensor) -> float:
    """Return the `relative_error` of a packed run; inf if the run raises an error."""
    try:
        return relative_error(packed(), expected)
    except (ValueError, TypeError, AttributeError, AssertionError, KeyError, RuntimeError) as problem:
        logger.warning("the packed trial run failed: %s", problem)
        return float("inf")


@torch.inference_mode()
def packed_states(
    backbone: Backbone,
    prompts: Prompts,
    tokens_per_chunk: int,
    cache: PrefixCache | None = None,
    boundaries: Sequence[IntArray] | None = None,
) -> HiddenStates:
    """Run each distinct token once, `tokens_per_chunk` tokens at a time. No prompt may be empty.

    Given a cache and each prompt's boundaries, skips the cached beginning of each prompt, and caches each prompt up to
    its last boundary.
    """
    tree_attention.use_in(backbone.model)
    forest, found = plan_forest(prompts), list[list[Segment]]()
    if cache is not None and boundaries is not None:
        found = [cache.lookup(prompts[n], boundaries[n]) for n in range(len(prompts))]
        forest = skip_known(forest, np.array([length(entry) for entry in found]))
    state = tree_attention.ForestState(backbone.device, [segment for entry in found for segment in entry])
    states = torch.empty(len(prompts), backbone.dimension, dtype=torch.float32)
    for chunk in split_chunks(forest, tokens_per_chunk):
        hidden = state.run(backbone.model, chunk, DTYPES[backbone.dtype])
        states[torch.from_numpy(chunk.prompts)] = hidden[torch.from_numpy(chunk.leaves)].float().cpu()
        if cache is not None and boundaries is not None:
            for n, leaf in zip(chunk.prompts, chunk.leaves, strict=True):
                cache.keep(prompts[n], boundaries[n], found[n], chunk.seen(leaf), state.keys_and_values)
    return HiddenStates(states, forest.tokens.size)


@torch.inference_mode()
def padded_states(backbone: Backbone, prompts: Prompts, batch_size: int) -> HiddenStates:
    """Run every prompt in full, in padded batches of `batch_size`, the longest first. No prompt may be empty.

    Padding is on the right, where causal attention never looks. So no mask is needed, and the fastest kernel applies.
    """
    backbone.model.set_attn_implementation(backbone.attention)  # type: ignore[operator]
    lengths = prompts.lengths
    states = torch.empty(len(prompts), backbone.dimension, dtype=torch.float32)
    for batch in np.array_split(np.argsort(-lengths, kind="stable"), -(-len(prompts) // batch_size)):
        tokens = np.zeros((batch.size, lengths[batch].max()), np.int64)
        for row, n in enumerate(batch):
            tokens[row, : lengths[n]] = prompts[n]
        hidden = backbone.model(
            input_ids=torch.from_numpy(tokens).to(backbone.device),
            position_ids=torch.arange(tokens.shape[1], device=backbone.device).expand(tokens.shape),
            use_cache=False,
        ).last_hidden_state
        states[torch.from_numpy(batch)] = hidden[torch.arange(batch.size), lengths[batch] - 1].float().cpu()
    return HiddenStates(states, int(lengths.sum()))


def relative_error(states: Tensor, expected: Tensor) -> float:
    """Return the largest distance of a state [N, D] from the expected one, divided by the expected one's norm."""
    return float(((states - expected).norm(dim=1) / expected.norm(dim=1)).max())

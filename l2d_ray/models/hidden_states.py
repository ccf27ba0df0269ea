"""Running prompts: the last layer's hidden state at the last token of each.

Two ways to the same numbers. `packed_states` runs every distinct token once (`core/packing.py`). `padded_states` runs
the prompts side by side in padded batches, as research code does: the yardstick, and the way for an architecture whose
attention cannot be replaced. Packed, a prompt's beginning that a `PrefixCache` knows from an earlier batch does not run
again.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from l2d_ray.core.packing import IntArray, Prompts, plan_forest, skip_known, split_chunks
from l2d_ray.models import tree_attention
from l2d_ray.models.backbone import DTYPES, Backbone
from l2d_ray.models.prefix_cache import PrefixCache

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2, "int8": 1e-2}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HiddenStates:
    """What a batch of prompts gave."""

    states: Tensor
    """[N, D] float32, on the CPU."""
    tokens: int
    """Tokens that went through the model."""


class Extractor(Protocol):
    """Prompts to hidden states."""

    def __call__(self, prompts: Prompts, boundaries: Sequence[IntArray] | None = None) -> HiddenStates:
        """The states of `prompts`; with the `boundaries` of each, the cache, if there is one, is used."""


def extractor(backbone: Backbone, tokens_per_chunk: int, cache: PrefixCache | None = None) -> Extractor:
    """The fastest way that is right for this model: packed, or, if a trial says that packing is not, padded.

    Only packed prompts can use `cache`.
    """
    trial = Prompts.join([np.array(tokens, np.int32) for tokens in ([5, 6, 7, 8], [5, 6, 9], [5, 6, 7])])
    expected = padded_states(backbone, trial, batch_size=1).states
    error = trial_error(lambda: packed_states(backbone, trial, tokens_per_chunk=4).states, expected)
    if error < TOLERANCE[backbone.dtype]:
        return lambda prompts, boundaries=None: packed_states(backbone, prompts, tokens_per_chunk, cache, boundaries)
    logger.warning("%s cannot run packed (error %.1e): padded batches instead", type(backbone.model).__name__, error)
    return lambda prompts, boundaries=None: padded_states(backbone, prompts, batch_size=16)


def trial_error(packed: Callable[[], Tensor], expected: Tensor) -> float:
    """How far the numbers of a packed run are from those expected (`relative_error`); inf if it fails."""
    try:
        return relative_error(packed(), expected)
    except (ValueError, TypeError, AttributeError, AssertionError, KeyError, RuntimeError) as problem:
        logger.warning("packing failed a trial: %s", problem)
        return float("inf")


@torch.inference_mode()
def packed_states(
    backbone: Backbone,
    prompts: Prompts,
    tokens_per_chunk: int,
    cache: PrefixCache | None = None,
    boundaries: Sequence[IntArray] | None = None,
) -> HiddenStates:
    """Each distinct token once, `tokens_per_chunk` tokens at a time. No prompt may be empty.

    Given a cache and the boundaries of each prompt, what the cache knows of a prompt is not run, and it keeps each
    prompt up to its last boundary.
    """
    tree_attention.use_in(backbone.model)
    forest, known = plan_forest(prompts), []
    if cache is not None and boundaries is not None:
        known = [cache.lookup(prompts[n], boundaries[n]) for n in range(len(prompts))]
        forest = skip_known(forest, np.array([len(layers[0]) if layers else 0 for layers in known]))
    state = tree_attention.ForestState(backbone.device, list(filter(None, known)))
    states = torch.empty(len(prompts), backbone.dimension, dtype=torch.float32)
    for chunk in split_chunks(forest, tokens_per_chunk):
        hidden = state.run(backbone.model, chunk, DTYPES[backbone.dtype])
        states[torch.from_numpy(chunk.prompts)] = hidden[torch.from_numpy(chunk.leaves)].float().cpu()
        if cache is not None and boundaries is not None:
            for n, leaf in zip(chunk.prompts, chunk.leaves, strict=True):
                cache.keep(prompts[n], boundaries[n], state.layers, chunk.seen(leaf))
    return HiddenStates(states, forest.tokens.size)


@torch.inference_mode()
def padded_states(backbone: Backbone, prompts: Prompts, batch_size: int) -> HiddenStates:
    """Every prompt in full, the longest first, `batch_size` side by side. No prompt may be empty.

    Padding stands on the right, where causal attention never looks, so that no mask is needed and the fastest kernel
    applies.
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
    """The largest distance of a state [N, D] from the expected one, relative to the latter's length."""
    return float(((states - expected).norm(dim=1) / expected.norm(dim=1)).max())

"""The training objective on a prefix forest: cross-entropy of each sample's title given its prompt, nothing else.

Every distinct token runs once, with a gradient; a title's token is predicted from its parent's state. The vocabulary is
large (for a small model the head costs as much as ten layers), so that logits are made only where a token is predicted,
and some at a time: what a chunk's logits need for the gradient is computed again instead of kept.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from l2d_ray.core.packing import TrainingSamples, plan_forest, plan_targets, split_chunks
from l2d_ray.models import tree_attention
from l2d_ray.models.trainable import without_adapter

LOGITS_PER_CHUNK = 1024
"""States whose logits are in memory at a time; 1,024 of a 128,000-word vocabulary take 0.5 GB in float32."""


@dataclass(frozen=True)
class LossCounts:
    """What a loss cost."""

    distinct_tokens: int
    """Tokens that went through the model."""
    tokens: int
    """Tokens of all sequences."""


def packed_loss(model: Any, samples: TrainingSamples) -> tuple[Tensor, LossCounts]:
    """The sum over samples of the mean cross-entropy of their title's tokens; every distinct token runs once.

    `model` is transformers' AutoModelForCausalLM, also under PEFT, with attention `tree_attention.NAME`.
    """
    forest = plan_forest(samples.sequences)
    targets = plan_targets(forest, samples.target_lengths)
    base, head, device = _parts(model)
    state = tree_attention.ForestState(device)
    (chunk,) = split_chunks(forest, forest.tokens.size)
    state.enter(chunk, next(base.parameters()).dtype)
    hidden = base(
        input_ids=torch.from_numpy(chunk.tokens)[None].to(device),
        position_ids=torch.from_numpy(chunk.positions)[None].to(device),
        use_cache=False,
        forest=state,
    ).last_hidden_state[0]
    loss = _loss(head, hidden, targets.parents, targets.tokens, targets.weights)
    return loss, LossCounts(forest.tokens.size, samples.sequences.tokens.size)


def padded_loss(model: Any, samples: TrainingSamples) -> Tensor:
    """The same from every sequence in full, side by side in one padded batch: the yardstick, and the way for an
    architecture that cannot run packed. `model` has its own attention."""
    base, head, device = _parts(model)
    sequences, lengths = samples.sequences, samples.sequences.lengths
    tokens = np.zeros((len(sequences), lengths.max()), np.int64)
    for row in range(len(sequences)):
        tokens[row, : lengths[row]] = sequences[row]
    hidden = base(
        input_ids=torch.from_numpy(tokens).to(device),
        position_ids=torch.arange(tokens.shape[1], device=device).expand(tokens.shape),
        use_cache=False,
    ).last_hidden_state.flatten(0, 1)
    column = np.arange(tokens.shape[1])
    is_target = (column < lengths[:, None]) & (column >= (lengths - samples.target_lengths)[:, None])
    rows, columns = np.nonzero(is_target)
    weights = (1 / samples.target_lengths[rows]).astype(np.float32)
    return _loss(head, hidden, rows * tokens.shape[1] + columns - 1, tokens[rows, columns], weights)


def _parts(model: Any) -> tuple[Any, Any, torch.device]:
    """The layers, the head, and where they are."""
    causal = without_adapter(model)
    return causal.base_model, causal.get_output_embeddings(), next(causal.parameters()).device


def _loss(
    head: Any, hidden: Tensor, parents: NDArray[np.int64], tokens: NDArray[np.int64], weights: NDArray[np.float32]
) -> Tensor:
    """The weighted sum of the cross-entropy of `tokens` [Y] given `hidden[parents]`."""
    states, ids, weight = (torch.from_numpy(array).to(hidden.device) for array in (parents, tokens, weights))
    parts = [torch.split(tensor, LOGITS_PER_CHUNK) for tensor in (hidden[states], ids, weight)]
    if len(parts[0]) == 1:
        return _weighted(head, hidden[states], ids, weight)
    return torch.stack(
        [checkpoint(_weighted, head, *part, use_reentrant=False) for part in zip(*parts, strict=True)]
    ).sum()


def _weighted(head: Any, hidden: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    return (cross_entropy(head(hidden).float(), ids, reduction="none") * weight).sum()

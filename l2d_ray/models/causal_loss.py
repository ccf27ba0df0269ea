"""The training objective: cross-entropy of each sample's title given its prompt.

Two functions compute the same loss. `packed_loss` runs every distinct token of a prefix forest once and predicts a
title's token from its parent's state. `padded_loss` runs every sequence in full. It is the reference, and it serves
architectures that cannot run packed; `runs_packed` tells which.

The vocabulary is large: for a small model the head costs as much as ten layers. So logits are computed only where a
token is predicted. `packed_loss` computes them in chunks and recomputes each chunk for the gradient, to save memory.
Given the tokens that titles use, it computes no others: the cross-entropy is then over those tokens alone.

Shapes: Y predicted tokens, D hidden size, V vocabulary size.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, linear_cross_entropy
from torch.utils.checkpoint import checkpoint

from l2d_ray.core.arrays import IntArray
from l2d_ray.core.packing import PrefixForest, Prompts, TrainingSamples, plan_forest, plan_targets, split_chunks
from l2d_ray.models import tree_attention
from l2d_ray.models.hidden_states import TOLERANCE, trial_error
from l2d_ray.models.trainable import without_adapter

LOGITS_PER_CHUNK = 1024
"""Tokens whose logits are in memory at a time. With 128,000 words in the vocabulary they take 0.5 GB in float32."""


@dataclass(frozen=True)
class LossCounts:
    """The number of tokens behind a loss."""

    distinct_tokens: int
    """Tokens that went through the model."""
    tokens: int
    """Tokens of all sequences, prompts and titles."""


def packed_loss(model: Any, samples: TrainingSamples, vocabulary: Tensor | None = None) -> tuple[Tensor, LossCounts]:
    """Sum the mean cross-entropy of each sample's title over the samples, running every distinct token once.

    `model` is a transformers AutoModelForCausalLM, with or without PEFT around it. `vocabulary` holds, sorted, the
    token ids to choose from; the titles must consist of them. None: all tokens.
    """
    forest = plan_forest(samples.sequences)
    targets = plan_targets(forest, samples.target_lengths)
    causal = without_adapter(model)
    states = _packed_states(causal, forest, targets.parents)
    ids, weights = (torch.from_numpy(array).to(states.device) for array in (targets.tokens, targets.weights))
    loss = _loss_in_chunks(causal, vocabulary, states, ids, weights)
    return loss, LossCounts(forest.tokens.size, samples.sequences.tokens.size)


def _loss_in_chunks(causal: Any, vocabulary: Tensor | None, states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of the losses of Y tokens, with the logits of some of them in memory at a time.

    On a GPU these are PyTorch's own chunks, if the logits are a plain product. On a CPU they took 1.7 times as long.
    """
    if states.is_cuda and has_plain_logits(causal):
        return library_loss(causal, vocabulary, states, ids, weights)
    chunks = list(zip(*(torch.split(tensor, LOGITS_PER_CHUNK) for tensor in (states, ids, weights)), strict=True))
    if len(chunks) == 1:
        return _loss_of_states(causal, vocabulary, states, ids, weights)
    parts = [checkpoint(_loss_of_states, causal, vocabulary, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.stack(parts).sum()


def library_loss(causal: Any, vocabulary: Tensor | None, states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of the losses of Y tokens by `torch.nn.functional.linear_cross_entropy`.

    It computes gradients along with each chunk of logits, instead of computing the logits again.
    """
    weight, bias = _head(causal, vocabulary)
    ids = ids if vocabulary is None else torch.searchsorted(vocabulary, ids)
    options = nn.LinearCrossEntropyOptions()
    losses = linear_cross_entropy(states, weight, ids, linear_bias=bias, reduction="none", options=options)
    return (losses.float() * weights).sum()


def padded_loss(model: Any, samples: TrainingSamples, vocabulary: Tensor | None = None) -> tuple[Tensor, LossCounts]:
    """Compute the same loss as `packed_loss`, running every sequence in full in one padded batch, with all logits."""
    sequences, titles = samples.sequences, samples.target_lengths
    logits = _padded_logits(model, sequences, sequences.lengths - titles - 1, sequences.lengths - 1)
    tokens = np.concatenate([sequences[n][-titles[n] :] for n in range(len(samples))])
    ids = torch.from_numpy(tokens.astype(np.int64)).to(logits.device)
    weights = torch.from_numpy(np.repeat(1 / titles, titles).astype(np.float32)).to(logits.device)
    if vocabulary is not None:
        logits = logits[:, vocabulary]
    return _cross_entropy(logits, ids, weights, vocabulary), LossCounts(sequences.tokens.size, sequences.tokens.size)


def runs_packed(model: Any, dtype: str) -> bool:
    """Return whether `packed_loss` is right for this architecture: compare packed with padded logits of a few prompts.

    Leaves the model in training mode.
    """
    model.eval()
    causal = without_adapter(model)
    vocabulary = causal.get_input_embeddings().num_embeddings
    start, *ends = np.random.default_rng(0).integers(0, vocabulary, (5, 4)).astype(np.int32)
    trial = Prompts.join([np.concatenate([start, end[: n + 1]]) for n, end in enumerate(ends)])
    forest = plan_forest(trial)
    expected = _padded_logits(model, trial, trial.lengths - 1, trial.lengths).detach().float()
    error = trial_error(
        lambda: _logits(causal, _packed_states(causal, forest, forest.leaves)).detach().float(), expected
    )
    model.train()
    return error < TOLERANCE[dtype]


def _packed_states(causal: Any, forest: PrefixForest, tokens_Y: IntArray) -> Tensor:
    """Return the states [Y, D] of the tokens at these indices of a forest."""
    tree_attention.use_in(causal.base_model)
    state = tree_attention.ForestState(causal.device)
    (chunk,) = split_chunks(forest, forest.tokens.size)
    return state.run(causal.base_model, chunk, causal.dtype)[torch.from_numpy(tokens_Y).to(causal.device)]


def _logits(causal: Any, states_YD: Tensor, vocabulary: Tensor | None = None) -> Tensor:
    """Return logits [Y, V], scaled and capped as the model's `forward` does in the families known here.

    With a `vocabulary`, V counts its tokens.
    """
    config = causal.config
    if vocabulary is None:
        logits: Tensor = causal.get_output_embeddings()(states_YD)
    else:
        logits = linear(states_YD, *_head(causal, vocabulary))
    logits = logits * (getattr(config, "logit_scale", None) or 1)  # Cohere
    logits = logits / (getattr(config, "logits_scaling", None) or 1)  # Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return cap * torch.tanh(logits / cap) if cap else logits


def has_plain_logits(causal: Any) -> bool:
    """Return whether logits are the product of states and the head's weights, neither adapted nor scaled nor capped."""
    names = ("logit_scale", "logits_scaling", "final_logit_softcapping")
    scaled = any(getattr(causal.config, name, None) not in (None, 1) for name in names)
    return type(causal.get_output_embeddings()) is nn.Linear and not scaled


def _head(causal: Any, vocabulary: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return weights [V, D] and bias [V] of the head, or those of the tokens of a vocabulary."""
    head = causal.get_output_embeddings()
    if vocabulary is None:
        return head.weight, head.bias
    return head.weight[vocabulary], None if head.bias is None else head.bias[vocabulary]


def _loss_of_states(
    causal: Any, vocabulary: Tensor | None, states_YD: Tensor, ids_Y: Tensor, weights_Y: Tensor
) -> Tensor:
    return _cross_entropy(_logits(causal, states_YD, vocabulary), ids_Y, weights_Y, vocabulary)


def _padded_logits(model: Any, prompts: Prompts, starts: IntArray, stops: IntArray) -> Tensor:
    """Return the logits [Y, V] at tokens `starts[n]` to `stops[n] - 1` of each prompt, with unpacked attention."""
    causal = without_adapter(model)
    causal.base_model.set_attn_implementation("sdpa" if causal._supports_sdpa else "eager")
    lengths = prompts.lengths[:, None]
    columns = np.broadcast_to(np.arange(lengths.max()), (len(prompts), lengths.max()))
    tokens = np.zeros(columns.shape, np.int64)
    tokens[columns < lengths] = prompts.tokens
    arrays = {
        "input_ids": tokens,
        "position_ids": columns,
        "logits_to_keep": (starts[:, None] <= columns) & (columns < stops[:, None]),
    }
    tensors = {name: torch.tensor(array, device=causal.device) for name, array in arrays.items()}
    logits: Tensor = causal(**tensors, use_cache=False).logits
    return logits


def _cross_entropy(logits_YV: Tensor, ids_Y: Tensor, weights_Y: Tensor, vocabulary: Tensor | None) -> Tensor:
    if vocabulary is not None:
        ids_Y = torch.searchsorted(vocabulary, ids_Y)
    return (cross_entropy(logits_YV.float(), ids_Y, reduction="none") * weights_Y).sum()

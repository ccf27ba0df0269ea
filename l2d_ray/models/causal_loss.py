"""The training objective: cross-entropy of each sample's title given its prompt, nothing else.

Two ways to the same numbers. `packed_loss` runs every distinct token of a prefix forest once, with a gradient, and
predicts a title's token from its parent's state. `padded_loss` runs every sequence in full: the yardstick, and the way
for an architecture that cannot run packed, as `runs_packed` finds. The vocabulary is large (for a small model the head
costs as much as ten layers), so that logits are made only where a token is predicted and, packed, some at a time: what
a chunk's logits need for the gradient is computed again instead of kept.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from l2d_ray.core.packing import PrefixForest, Prompts, TrainingSamples, plan_forest, plan_targets, split_chunks
from l2d_ray.models import tree_attention
from l2d_ray.models.hidden_states import TOLERANCE, trial_error
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

    `model` is transformers' AutoModelForCausalLM, also under PEFT.
    """
    forest = plan_forest(samples.sequences)
    targets = plan_targets(forest, samples.target_lengths)
    causal = without_adapter(model)
    states = _packed_states(causal, forest, targets.parents)
    ids, weights = (torch.from_numpy(array).to(states.device) for array in (targets.tokens, targets.weights))
    chunks = list(zip(*(torch.split(part, LOGITS_PER_CHUNK) for part in (states, ids, weights)), strict=True))
    if len(chunks) == 1:
        loss = _weighted(causal, states, ids, weights)
    else:
        loss = torch.stack([checkpoint(_weighted, causal, *chunk, use_reentrant=False) for chunk in chunks]).sum()
    return loss, LossCounts(forest.tokens.size, samples.sequences.tokens.size)


def padded_loss(model: Any, samples: TrainingSamples) -> tuple[Tensor, LossCounts]:
    """The same from every sequence in full, side by side in one padded batch."""
    sequences, titles = samples.sequences, samples.target_lengths
    logits = _padded_logits(model, sequences, sequences.lengths - titles - 1, sequences.lengths - 1)
    tokens = np.concatenate([sequences[n][-titles[n] :] for n in range(len(samples))])
    ids = torch.from_numpy(tokens.astype(np.int64)).to(logits.device)
    weights = torch.from_numpy(np.repeat(1 / titles, titles).astype(np.float32)).to(logits.device)
    return _cross_entropy(logits, ids, weights), LossCounts(sequences.tokens.size, sequences.tokens.size)


def runs_packed(model: Any, dtype: str) -> bool:
    """Whether this architecture may be trained by `packed_loss`: a trial of its logits against those of `padded_loss`.

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


def _packed_states(causal: Any, forest: PrefixForest, kept: NDArray[np.int64]) -> Tensor:
    """[Y, D] the states of these Y tokens of a forest."""
    tree_attention.use_in(causal.base_model)
    state = tree_attention.ForestState(causal.device)
    (chunk,) = split_chunks(forest, forest.tokens.size)
    return state.run(causal.base_model, chunk, causal.dtype)[torch.from_numpy(kept).to(causal.device)]


def _logits(causal: Any, states_YD: Tensor) -> Tensor:
    """[Y, V] what the model's own forward makes of these states, as far as `runs_packed` finds."""
    config = causal.config
    logits: Tensor = causal.get_output_embeddings()(states_YD)
    logits = logits * (getattr(config, "logit_scale", None) or 1)  # Cohere
    logits = logits / (getattr(config, "logits_scaling", None) or 1)  # Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return cap * torch.tanh(logits / cap) if cap else logits


def _weighted(causal: Any, states_YD: Tensor, ids_Y: Tensor, weights_Y: Tensor) -> Tensor:
    return _cross_entropy(_logits(causal, states_YD), ids_Y, weights_Y)


def _padded_logits(model: Any, prompts: Prompts, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> Tensor:
    """[Y, V] what the model, with its own attention, predicts from the states of each prompt's tokens from its start to
    before its stop."""
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


def _cross_entropy(logits_YV: Tensor, ids_Y: Tensor, weights_Y: Tensor) -> Tensor:
    return (cross_entropy(logits_YV.float(), ids_Y, reduction="none") * weights_Y).sum()

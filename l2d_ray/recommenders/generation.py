"""Beam search with transformers' `generate`: what both ways of writing titles share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from l2d_ray.models.backbone import LanguageModel

Tokens = NDArray[np.int32]


@dataclass
class BeamSearch:
    """Continues prompts in padded batches, with a KV cache that starts from one run of each prompt."""

    language_model: LanguageModel
    beams: int
    """At least 2."""
    max_tokens: int
    """Tokens of a continuation at most."""
    end_tokens: list[int]
    batch_size: int
    """Prompts side by side."""
    tokens: int = 0
    """That went through the model so far: a prompt's once, then those of every beam."""

    def continuations(
        self, prompts: Sequence[Tokens], constraint: Callable[[NDArray[np.intp], int], LogitsProcessor] | None = None
    ) -> list[list[tuple[Tokens, float]]]:
        """For each prompt its beams, the best first: the tokens before the end token, and their log-probability.

        `constraint(prompts of the batch, width of its prompts)` makes the processor of one batch.
        """
        results: list[list[tuple[Tokens, float]]] = [[] for _ in prompts]
        order = np.argsort([prompt.size for prompt in prompts], kind="stable")
        for start in range(0, order.size, self.batch_size):
            batch = order[start : start + self.batch_size]
            for n, beams in zip(batch, self._run([prompts[n] for n in batch], batch, constraint), strict=True):
                results[n] = beams
        return results

    @torch.inference_mode()
    def _run(self, prompts: list[Tokens], batch: NDArray[np.intp], constraint: Any) -> list[list[tuple[Tokens, float]]]:
        backbone, model = (
            self.language_model.backbone,
            self.language_model.model.to(self.language_model.backbone.device),
        )
        model.set_attn_implementation(backbone.attention)  # packed extraction leaves its own
        tokens, mask = _left_padded(prompts, backbone.device)
        width = tokens.shape[1]
        model.generation_config = GenerationConfig()  # the model's own may penalise repetition, or ban words
        output = model.generate(
            input_ids=tokens,
            attention_mask=mask,
            past_key_values=self._prefilled(tokens, mask) if width > 1 else None,
            num_beams=self.beams,
            num_return_sequences=self.beams,
            max_new_tokens=self.max_tokens,
            do_sample=False,
            length_penalty=0.0,  # log-probabilities are summed, not averaged (D3, arXiv 2406.14900)
            eos_token_id=self.end_tokens,
            pad_token_id=self.end_tokens[0],
            logits_processor=LogitsProcessorList([constraint(batch, width)] if constraint else []),
            return_dict_in_generate=True,
            output_scores=True,
        )
        steps = output.sequences.shape[1] - width  # of which the last one's tokens are not run any more
        self.tokens += int(mask.sum()) + (steps - 1) * self.beams * len(prompts)
        written = output.sequences[:, width:].cpu().numpy().astype(np.int32).reshape(len(prompts), self.beams, -1)
        scores = output.sequences_scores.cpu().numpy().reshape(len(prompts), self.beams)
        return [
            [(self._until_end(beam), float(score)) for beam, score in zip(*own, strict=True)]
            for own in zip(written, scores, strict=True)
        ]

    def _prefilled(self, tokens: Tensor, mask: Tensor) -> Any:
        """Keys and values of all but the last token, for every beam. generate would run the prompt once for each."""
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        cache = self.language_model.backbone.model(
            input_ids=tokens[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1], use_cache=True
        ).past_key_values
        cache.batch_repeat_interleave(self.beams)
        return cache

    def _until_end(self, tokens: Tokens) -> Tokens:
        ends = np.flatnonzero(np.isin(tokens, self.end_tokens))
        return tokens[: ends[0]] if ends.size else tokens


def _left_padded(prompts: list[Tokens], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens [N, L] that end together, and which of them are real."""
    width = max(prompt.size for prompt in prompts)
    tokens, mask = np.zeros((len(prompts), width), np.int64), np.zeros((len(prompts), width), np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, width - prompt.size :], mask[row, width - prompt.size :] = prompt, 1
    return torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device)

"""Beam search with transformers' `generate`, for recommenders that write titles."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from l2d_ray.models.backbone import LanguageModel

if TYPE_CHECKING:
    from l2d_ray.encoding import HistoryEncoder

Tokens = NDArray[np.int32]
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
"""Changes the scores [R, V] of the next token, given the tokens [R, L] so far, of R beams over V tokens."""


@dataclass(frozen=True)
class Continuations:
    """Texts that beam search wrote."""

    beams: list[list[tuple[Tokens, float]]]
    """Each prompt's beams, best first: the tokens before the end token, and their log-probability."""
    tokens: int
    """Tokens that went through the model: those of every prompt once, then those of every beam."""


@dataclass(frozen=True)
class BeamSearch:
    """Beam search in padded batches, with a KV cache that is filled by running each prompt once."""

    language_model: LanguageModel
    beams: int
    """At least 2."""
    max_tokens: int
    """Longest continuation."""
    end_tokens: list[int]
    batch_size: int
    """Prompts per batch."""

    @classmethod
    def of_titles(
        cls, language_model: LanguageModel, encoder: "HistoryEncoder", num_items: int, beams: int, batch_size: int
    ) -> "BeamSearch":
        """Build a search that writes titles freely, none longer than the longest title of the catalogue."""
        # The token that follows a title in an item's form, by default a line break, ends a title, too.
        ends = {language_model.backbone.tokenizer.eos_token_id, *encoder.prompts.item_end[:1].tolist()}
        longest = max(title.size for title in encoder.prompts.pieces(range(num_items)))
        return cls(language_model, beams, longest, sorted(ends), batch_size)

    def continuations(
        self, prompts: Sequence[Tokens], constraint: Callable[[NDArray[np.intp], int], LogitsProcessor] | None = None
    ) -> Continuations:
        """Continue each prompt.

        `constraint(numbers of a batch's prompts, width of these prompts)` makes the logits processor of a batch.
        """
        results: list[list[tuple[Tokens, float]]] = [[] for _ in prompts]
        order, tokens = np.argsort([prompt.size for prompt in prompts], kind="stable"), 0
        for start in range(0, order.size, self.batch_size):
            batch = order[start : start + self.batch_size]
            continued = self._continue([prompts[n] for n in batch], batch, constraint)
            tokens += continued.tokens
            for n, beams in zip(batch, continued.beams, strict=True):
                results[n] = beams
        return Continuations(results, tokens)

    @torch.inference_mode()
    def _continue(
        self,
        prompts: list[Tokens],
        batch: NDArray[np.intp],
        constraint: Callable[[NDArray[np.intp], int], LogitsProcessor] | None,
    ) -> Continuations:
        backbone = self.language_model.backbone
        model = self.language_model.model.to(backbone.device)
        model.set_attn_implementation(backbone.attention)  # packed extraction leaves another one
        tokens, mask = _left_padded(prompts, backbone.device)
        width = tokens.shape[1]
        model.generation_config = GenerationConfig()  # the model's may penalise repetition or ban words
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
        steps = output.sequences.shape[1] - width  # the tokens of the last step are not run
        written = output.sequences[:, width:].cpu().numpy().astype(np.int32).reshape(len(prompts), self.beams, -1)
        scores = output.sequences_scores.cpu().numpy().reshape(len(prompts), self.beams)
        beams = [
            [(self._until_end(beam), float(score)) for beam, score in zip(*of_prompt, strict=True)]
            for of_prompt in zip(written, scores, strict=True)
        ]
        return Continuations(beams, int(mask.sum()) + (steps - 1) * self.beams * len(prompts))

    def _prefilled(self, tokens: Tensor, mask: Tensor) -> Any:
        """Return keys and values of all tokens but the last, for every beam. `generate` would run a prompt per beam."""
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
    """Return the tokens [N, L] of prompts that end in the last column, and a mask that is 0 for padding."""
    width = max(prompt.size for prompt in prompts)
    tokens, mask = np.zeros((len(prompts), width), np.int64), np.zeros((len(prompts), width), np.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, width - prompt.size :], mask[row, width - prompt.size :] = prompt, 1
    return torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device)

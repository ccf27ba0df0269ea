"""From histories to hidden states: what a query is, in exactly the way its memory was made."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l2d_ray.config import Config
from l2d_ray.core.arrays import FloatArray
from l2d_ray.core.packing import IntArray, Prompts
from l2d_ray.core.samples import last_window
from l2d_ray.models.backbone import (
    Backbone,
    LanguageModel,
    identify,
    load_backbone,
    load_language_model,
    resolve_dtype,
)
from l2d_ray.models.hidden_states import HiddenStates, extractor
from l2d_ray.models.prefix_cache import PrefixCache
from l2d_ray.prompts import PromptEncoder, template_digest
from l2d_ray.records import MemoryIdentity

History = Sequence[int | str] | NDArray[np.integer]
"""Items in time order: their indices, or titles where the catalogue does not know them."""


def identify_memory(config: Config) -> MemoryIdentity:
    """What all states that this configuration makes have in common. Raises InputError if the model is not there."""
    backbone = identify(config.model, resolve_dtype(config.model, config.device))
    return MemoryIdentity(
        base_model=backbone.base_model,
        num_layers=backbone.num_layers,
        adapter=backbone.adapter,
        tokenizer=backbone.tokenizer,
        dtype=backbone.dtype,
        dimension=backbone.dimension,
        template=template_digest(config.prompt),
        max_items=config.history.max_items,
        stride=config.history.stride,
        num_shards=config.memory.num_shards,
    )


def language_model(config: Config) -> LanguageModel:
    """The model of `config` with its head, on a GPU if `workers.gpus` says so. Raises InputError as its loader does."""
    return load_language_model(config.model, resolve_dtype(config.model, config.device), config.device)


@dataclass(frozen=True)
class Encoded:
    """The states of a batch of histories."""

    states_UD: FloatArray
    """[U, D] float32."""
    tokens: int
    """Tokens that went through the model."""


@dataclass(frozen=True)
class PhrasedHistory:
    """A prompt, and where a longer history's prompt may part from it."""

    tokens: NDArray[np.int32]
    """The prompt."""
    boundaries: IntArray
    """Its length up to the end of each item."""


class HistoryEncoder:
    """Phrases the last window of each history and runs it. Holds the model."""

    def __init__(
        self, config: Config, titles: Sequence[str], backbone: Backbone | None = None, cache_bytes: int = 0
    ) -> None:
        """Load the model of `config`, on a GPU if `workers.gpus` says so, unless it is given.

        `titles[item_index]` is an item's title. `cache_bytes` of the model's device are for what `run` has run.
        """
        dtype = resolve_dtype(config.model, config.device)
        self.backbone = backbone or load_backbone(config.model, dtype, config.device)
        self.prompts = PromptEncoder(config.prompt, self.backbone.tokenizer, titles)
        self._window = config.history
        self.tokens_per_chunk = config.workers.tokens_per_chunk or (16_384 if config.device == "cuda" else 2048)
        self.cache = PrefixCache(cache_bytes)
        self.extract = extractor(self.backbone, self.tokens_per_chunk, self.cache if cache_bytes else None)

    def phrase(self, history: History, room: int = 0) -> NDArray[np.int32]:
        """The prompt of one history: its last window, less its oldest items if the model cannot read so many.

        An item of the history is its index, or its title if the catalogue does not know it. `room` tokens of the
        model's context are left for what it is to write.
        """
        return self.phrased(history, room).tokens

    def phrased(self, history: History, room: int = 0) -> PhrasedHistory:
        """`phrase`, with what `run` needs to know of it."""
        window = last_window(len(history), self._window.max_items, self._window.stride)
        pieces = self.prompts.pieces(history[window])
        while True:
            prompt = self.prompts.join(pieces)
            if prompt.size + room <= self.backbone.context_length or not pieces:
                return PhrasedHistory(prompt, self.prompts.item_ends(pieces))
            del pieces[0]

    def tokens_to_run(self, history: PhrasedHistory) -> int:
        """Tokens of the prompt that `run` would run at this moment, alone."""
        return history.tokens.size - self.cache.longest(history.tokens, history.boundaries)

    def run(self, histories: Sequence[PhrasedHistory]) -> HiddenStates:
        """The states of phrased histories, none empty; what an earlier call has run of them is not run again."""
        prompts = Prompts.join([history.tokens for history in histories])
        return self.extract(prompts, [history.boundaries for history in histories])

    def encode(self, histories: Sequence[History]) -> Encoded:
        """The states of histories of at least one known item each, every distinct token run once."""
        if not histories:
            return Encoded(np.empty((0, self.backbone.dimension), np.float32), 0)
        result = self.extract(Prompts.join([self.phrase(history) for history in histories]))
        return Encoded(result.states.numpy(), result.tokens)

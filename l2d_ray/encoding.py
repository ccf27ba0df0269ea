"""Encoding of histories as hidden states, in exactly the way the memory was made."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from l2d_ray.config import Config
from l2d_ray.core.arrays import FloatArray, IntArray
from l2d_ray.core.packing import Prompts
from l2d_ray.core.samples import last_window
from l2d_ray.models.identity import identify, resolve_dtype
from l2d_ray.prompts import PromptEncoder, template_digest
from l2d_ray.records import MemoryIdentity

if TYPE_CHECKING:  # these import PyTorch and transformers, which take seconds, and most processes run no model
    from l2d_ray.models.backbone import Backbone, LanguageModel
    from l2d_ray.models.hidden_states import HiddenStates

History = Sequence[int | str] | NDArray[np.integer]
"""Items in time order. An item is its index, or its title if the catalogue does not know it."""


def identify_memory(config: Config) -> MemoryIdentity:
    """Return the identity of the memory that `config` makes. Raises InputError if the model or adapter is missing."""
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


def language_model(config: Config) -> "LanguageModel":
    """Load the model of `config` with its head, on a GPU if `workers.gpus` is above 0.

    Raises InputError as `load_language_model` does.
    """
    from l2d_ray.models.backbone import load_language_model

    return load_language_model(config.model, resolve_dtype(config.model, config.device), config.device)


@dataclass(frozen=True)
class Encoded:
    """The hidden states of a batch of histories."""

    states_UD: FloatArray
    """[U, D] float32."""
    tokens: int
    """Tokens that went through the model."""


@dataclass(frozen=True)
class PhrasedHistory:
    """A prompt, and the lengths at which it may be cached."""

    tokens: NDArray[np.int32]
    """Token ids of the prompt."""
    boundaries: IntArray
    """Length of the prompt up to the end of each item, in tokens."""


class HistoryEncoder:
    """The model, its prompts and its prefix cache: phrases the last window of each history and runs it."""

    def __init__(
        self, config: Config, titles: Sequence[str], backbone: "Backbone | None" = None, cache_bytes: int = 0
    ) -> None:
        """Load the model of `config`, on a GPU if `workers.gpus` is above 0, unless `backbone` is given.

        `titles[item_index]` is an item's title. `run` caches up to `cache_bytes` of keys and values on the device.
        """
        from l2d_ray.models.backbone import load_backbone
        from l2d_ray.models.hidden_states import extractor
        from l2d_ray.models.prefix_cache import PrefixCache

        dtype = resolve_dtype(config.model, config.device)
        self.backbone = backbone or load_backbone(config.model, dtype, config.device)
        self.prompts = PromptEncoder(config.prompt, self.backbone.tokenizer, titles)
        self._window = config.history
        self.tokens_per_chunk = config.workers.tokens_per_chunk or (16_384 if config.device == "cuda" else 2048)
        self.cache = PrefixCache(cache_bytes)
        self.extract = extractor(self.backbone, self.tokens_per_chunk, self.cache if cache_bytes else None)

    def title_states(self, num_items: int) -> FloatArray:
        """Compute the state of each item's title alone, in the item's form but without prefix: [I, D] float32."""
        states: FloatArray = self.extract(Prompts.join(self.prompts.pieces(range(num_items)))).states.numpy()
        return states

    def phrase(self, history: History, room: int = 0) -> NDArray[np.int32]:
        """Return the prompt of a history's last window, as token ids.

        Leaves out the oldest items if the prompt exceeds the model's context. Keeps `room` tokens of the context free
        for text that the model generates.
        """
        return self.phrased(history, room).tokens

    def phrased(self, history: History, room: int = 0) -> PhrasedHistory:
        """Phrase a history for `run`: the prompt as `phrase` returns it, with its boundaries."""
        window = last_window(len(history), self._window.max_items, self._window.stride)
        pieces = self.prompts.pieces(history[window])
        while True:
            prompt = self.prompts.join(pieces)
            if prompt.size + room <= self.backbone.context_length or not pieces:
                return PhrasedHistory(prompt, self.prompts.item_ends(pieces))
            del pieces[0]

    def tokens_to_run(self, history: PhrasedHistory) -> int:
        """Count the tokens that `run` would run for this history alone, given the cache as it is now."""
        return history.tokens.size - self.cache.longest(history.tokens, history.boundaries)

    def run(self, histories: Sequence[PhrasedHistory]) -> "HiddenStates":
        """Compute the states of phrased histories, none empty. Skips what the cache holds of them."""
        prompts = Prompts.join([history.tokens for history in histories])
        return self.extract(prompts, [history.boundaries for history in histories])

    def encode(self, histories: Sequence[History]) -> Encoded:
        """Compute the states of histories, none empty. Runs every distinct token once and uses no cache."""
        if not histories:
            return Encoded(np.empty((0, self.backbone.dimension), np.float32), 0)
        result = self.extract(Prompts.join([self.phrase(history) for history in histories]))
        return Encoded(result.states.numpy(), result.tokens)

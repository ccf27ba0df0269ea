"""From a history to the tokens the model reads.

A template has three parts, prefix, one item's form, and suffix. They are tokenised separately and joined as token ids,
so that the prompt of a longer history extends the prompt of a shorter one token for token (up to the suffix): that is
what prefix-tree packing lives on.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l2d_ray.config import PromptConfig

TokenArray = NDArray[np.int32]


class PromptEncoder:
    """Phrases windows of histories. An item is tokenised once, when it is first met."""

    def __init__(self, template: PromptConfig, tokenizer: Any, titles: Sequence[str]) -> None:
        """`titles[item_index]` is an item's title; `tokenizer` is any tokenizer of transformers."""
        self._tokenizer = tokenizer
        self._titles = titles
        self._before, self._after = template.item.split("{title}")
        self._max_tokens = len(self._encode([self._before], literally=True)[0]) + template.max_item_tokens
        self._prefix = np.array(self._start_tokens() + self._encode([template.prefix])[0], np.int32)
        self._suffix = np.array(self._encode([template.suffix])[0], np.int32)
        self.item_end = np.array(self._encode([self._after], literally=True)[0], np.int32)
        """The tokens that an item's form ends with, after its title."""
        self._item_tokens: dict[int, TokenArray] = {}

    def encode(self, items: NDArray[np.int32], starts: NDArray[np.int64], stops: NDArray[np.int64]) -> list[TokenArray]:
        """The prompts of windows `items[start:stop]` of one history. Every item index must be in the catalogue."""
        pieces = self.pieces(items)
        offsets = np.cumsum([0, *(piece.size for piece in pieces)])
        history = np.concatenate([np.empty(0, np.int32), *pieces])
        return [self.join([history[offsets[start] : offsets[stop]]]) for start, stop in zip(starts, stops, strict=True)]

    def pieces(self, items: Iterable[int | str]) -> list[TokenArray]:
        """What each item adds to a prompt: its title, cut, in the item's form.

        An item is its index, or its title if the catalogue does not know it.
        """
        named = [item if isinstance(item, str) else int(item) for item in items]
        self._tokenise({item for item in named if isinstance(item, int)} - self._item_tokens.keys())
        return [self._in_form([item])[0] if isinstance(item, str) else self._item_tokens[item] for item in named]

    def item_tokens(self, item: int) -> TokenArray:
        """What one item adds to a prompt."""
        return self.pieces([item])[0]

    def join(self, items: Sequence[TokenArray]) -> TokenArray:
        """The prompt of one window, given what each of its items adds to it."""
        return np.concatenate([self._prefix, *items, self._suffix])

    def item_ends(self, items: Sequence[TokenArray]) -> NDArray[np.int64]:
        """The length of that prompt up to the end of each item."""
        return self._prefix.size + np.cumsum([item.size for item in items], dtype=np.int64)

    def _start_tokens(self) -> list[int]:
        """What the tokenizer itself puts at the start of a text: Llama's <|begin_of_text|>, or nothing."""
        start: list[int] = self._tokenizer("").input_ids[:1]
        return start if start == [self._tokenizer.bos_token_id] else []

    def _encode(self, texts: list[str], literally: bool = False) -> list[list[int]]:
        """Token ids of each text.

        Prefix and suffix may hold the model's special tokens; a title that says "<|im_end|>" is read literally.
        """
        ids: list[list[int]] = self._tokenizer(
            texts, add_special_tokens=False, split_special_tokens=literally
        ).input_ids
        return ids

    def _tokenise(self, new: set[int]) -> None:
        if not new:
            return
        items = sorted(new)
        self._item_tokens.update(zip(items, self._in_form([self._titles[item] for item in items]), strict=True))

    def _in_form(self, titles: list[str]) -> list[TokenArray]:
        tokens = self._encode([self._before + title for title in titles], literally=True)
        return [np.append(np.array(title[: self._max_tokens], np.int32), self.item_end) for title in tokens]


def template_digest(template: PromptConfig) -> str:
    """SHA-256 of everything that decides the text around and within the titles."""
    return hashlib.sha256(template.model_dump_json().encode()).hexdigest()

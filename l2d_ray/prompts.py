"""Prompts: from a history to the token ids that the model reads.

A template has three parts: a prefix, the form of one item, and a suffix. They are tokenised separately and joined as
token ids. So the prompt of a longer history extends the prompt of a shorter one token for token, up to the suffix.
Prefix-tree packing depends on this.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l2d_ray.config import PromptConfig

TokenArray = NDArray[np.int32]


class PromptEncoder:
    """A prompt template with a tokenizer and a catalogue. Each item is tokenised once, at its first use."""

    def __init__(self, template: PromptConfig, tokenizer: Any, titles: Sequence[str]) -> None:
        """Tokenise the template with a tokenizer of transformers. `titles[item_index]` is an item's title."""
        self._tokenizer = tokenizer
        self._titles = titles
        self._before, self._after = template.item.split("{title}")
        self._max_tokens = len(self._encode([self._before], literally=True)[0]) + template.max_item_tokens
        self._prefix = np.array(self._start_tokens() + self._encode([template.prefix])[0], np.int32)
        self._suffix = np.array(self._encode([template.suffix])[0], np.int32)
        self.item_end = np.array(self._encode([self._after], literally=True)[0], np.int32)
        """Tokens of an item's form after the title."""
        self._item_tokens: dict[int, TokenArray] = {}

    def accept(self, titles: Sequence[str]) -> bool:
        """Return whether one of both catalogues continues the other; then prompts may have the items of the longer one.

        A catalogue only grows while its dataset does, so that several versions of it share the tokens of their items.
        """
        shared = min(len(titles), len(self._titles))
        if list(titles[:shared]) != list(self._titles[:shared]):
            return False
        if len(titles) > shared:
            self._titles = titles
        return True

    def encode(self, items: NDArray[np.int32], starts: NDArray[np.int64], stops: NDArray[np.int64]) -> list[TokenArray]:
        """Return the prompts of windows `items[start:stop]` of one history. Every item must be in the catalogue."""
        pieces = self.pieces(items)
        offsets = np.cumsum([0, *(piece.size for piece in pieces)])
        history = np.concatenate([np.empty(0, np.int32), *pieces])
        return [self.join([history[offsets[start] : offsets[stop]]]) for start, stop in zip(starts, stops, strict=True)]

    def pieces(self, items: Iterable[int | str]) -> list[TokenArray]:
        """Return the tokens that each item adds to a prompt: its title, cut to `max_item_tokens`, in the item's form.

        An item is its index, or its title if the catalogue does not know it.
        """
        keys = [item if isinstance(item, str) else int(item) for item in items]
        self._tokenise({key for key in keys if isinstance(key, int)} - self._item_tokens.keys())
        return [self._in_form([key])[0] if isinstance(key, str) else self._item_tokens[key] for key in keys]

    def item_tokens(self, item: int) -> TokenArray:
        """Return the tokens that one item adds to a prompt."""
        return self.pieces([item])[0]

    def vocabulary(self) -> TokenArray:
        """Return the token ids that the items of the catalogue add to prompts, sorted, each once."""
        return np.unique(np.concatenate(self.pieces(range(len(self._titles)))))

    def join(self, items: Sequence[TokenArray]) -> TokenArray:
        """Join the tokens of a window's items, as `pieces` returns them, to its prompt."""
        return np.concatenate([self._prefix, *items, self._suffix])

    def item_ends(self, items: Sequence[TokenArray]) -> NDArray[np.int64]:
        """Return the length of that prompt up to the end of each item, in tokens."""
        return self._prefix.size + np.cumsum([item.size for item in items], dtype=np.int64)

    def _start_tokens(self) -> list[int]:
        """Return the token that the tokenizer puts at the start of a text, such as <|begin_of_text|>, or nothing."""
        start: list[int] = self._tokenizer("").input_ids[:1]
        return start if start == [self._tokenizer.bos_token_id] else []

    def _encode(self, texts: list[str], literally: bool = False) -> list[list[int]]:
        """Return the token ids of each text.

        Prefix and suffix may hold special tokens of the model. In a title, "<|im_end|>" is plain text (`literally`).
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
    """Return the SHA-256 of the template and of the length to which it cuts titles."""
    return hashlib.sha256(template.model_dump_json().encode()).hexdigest()

"""Language-space decoding that cannot leave the catalogue: beam search along a trie of the titles' tokens.

Source: D3 (arXiv 2406.14900): no length normalisation, so that an item's score is the log-probability of its title.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessor

from l2d_ray.core.arrays import Float64, IntArray
from l2d_ray.core.decoding import ScoredItems
from l2d_ray.encoding import HistoryEncoder
from l2d_ray.models.backbone import LanguageModel
from l2d_ray.recommenders.contract import EXCLUDE_SEEN, Filters, as_arrays
from l2d_ray.recommenders.generation import BeamSearch

UNREACHABLE = -1e8
"""`generate` starts the beams it does not need yet at -1e9; what stays there was never found."""


class StoppedError(Exception):
    """Nobody waits for the titles any more."""


@dataclass
class TitleTrie:
    """All titles as token sequences; node 0 is the root."""

    children: list[dict[int, int]] = field(default_factory=lambda: [{}])
    """Of each node: the node that a token leads to."""
    items: list[list[int]] = field(default_factory=lambda: [[]])
    """Of each node: the items whose title ends there. Titles that are the same after cutting share a node."""
    below: list[int] = field(default_factory=lambda: [0])
    """Of each node: items that end in it or further down."""

    @classmethod
    def of(cls, titles: Sequence[NDArray[np.int32]]) -> "TitleTrie":
        """The trie in which item i has the tokens `titles[i]`."""
        trie = cls()
        for item, tokens in enumerate(titles):
            nodes = trie.grow(tokens.tolist())
            trie.items[nodes[-1]].append(item)
            for node in nodes:
                trie.below[node] += 1
        return trie

    def grow(self, tokens: list[int]) -> list[int]:
        """The nodes along a sequence, the root first; missing ones are made."""
        nodes = [0]
        for token in tokens:
            if token not in self.children[nodes[-1]]:
                self.children[nodes[-1]][token] = len(self.children)
                self.children.append({})
                self.items.append([])
                self.below.append(0)
            nodes.append(self.children[nodes[-1]][token])
        return nodes

    def node(self, tokens: Sequence[int]) -> int | None:
        """Where a sequence leads, or None if no title begins like that."""
        node = 0
        for token in tokens:
            if token not in self.children[node]:
                return None
            node = self.children[node][token]
        return node


@dataclass(frozen=True)
class ConstrainedBeam:
    """The `beams` most probable titles of the catalogue, as far as beam search finds them."""

    encoder: HistoryEncoder
    search: BeamSearch
    trie: TitleTrie
    titles: Sequence[NDArray[np.int32]]

    @classmethod
    def over(
        cls, language_model: LanguageModel, encoder: HistoryEncoder, num_items: int, beams: int, batch_size: int
    ) -> "ConstrainedBeam":
        """Over the catalogue that `encoder` phrases."""
        titles = encoder.prompts.pieces(range(num_items))
        end = language_model.backbone.tokenizer.eos_token_id
        longest = max(title.size for title in titles)
        return cls(
            encoder, BeamSearch(language_model, beams, longest + 1, [end], batch_size), TitleTrie.of(titles), titles
        )

    def recommend(
        self,
        histories: Sequence[NDArray[np.int32]],
        k: int,
        filters: Filters = EXCLUDE_SEEN,
        stopped: Callable[[], bool] = lambda: False,
    ) -> tuple[IntArray, Float64]:
        """As in `Recommender`; scores are log-probabilities. Items that are filtered out take no beam.

        Raises StoppedError as soon as `stopped()`, which it asks before each token.
        """
        dead = [self._dead_nodes(out, filters.allow) for out in filters.excluded(histories)]
        beams = self.search.continuations(
            [self.encoder.phrase(history, room=self.search.max_tokens) for history in histories],
            lambda batch, width: _AlongTrie(
                self.trie, [dead[n] for n in batch], self.search.beams, width, self.search.end_tokens[0], stopped
            ),
        )
        lists = []
        for own, out in zip(beams, filters.excluded(histories), strict=True):
            found = [(item, score) for tokens, score in own if score > UNREACHABLE for item in self._items(tokens)]
            items_I, scores_I = (np.array([pair[n] for pair in found]) for n in (0, 1))
            lists.append(ScoredItems(items_I.astype(np.int64), scores_I).permitted(out, filters.allow))
        return as_arrays(lists, k)

    def _items(self, tokens: NDArray[np.int32]) -> list[int]:
        node = self.trie.node(tokens.tolist())
        return [] if node is None else self.trie.items[node]

    def _dead_nodes(self, exclude: IntArray, allow: IntArray | None) -> set[int]:
        """Nodes below which every item is filtered out."""
        if allow is not None:
            exclude = np.union1d(exclude, np.setdiff1d(np.arange(len(self.titles)), allow))
        excluded: dict[int, int] = {}
        for item in exclude[(exclude >= 0) & (exclude < len(self.titles))].tolist():
            for node in self.trie.grow(self.titles[item].tolist()):
                excluded[node] = excluded.get(node, 0) + 1
        return {node for node, count in excluded.items() if count == self.trie.below[node]}


class _AlongTrie(LogitsProcessor):  # type: ignore[misc]
    """Lets each beam go on only as some title does; where one ends, the end token is free."""

    def __init__(
        self, trie: TitleTrie, dead: list[set[int]], beams: int, width: int, end: int, stopped: Callable[[], bool]
    ) -> None:
        self._trie, self._dead, self._beams, self._width, self._end = trie, dead, beams, width, end
        self._stopped = stopped
        self._nodes: dict[bytes, int | None] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._stopped():
            raise StoppedError
        written = input_ids[:, self._width :].cpu().numpy()
        rows, tokens, ends = [], [], []
        for row, own in enumerate(written):
            node = self._node(own)
            if node is None:
                continue
            dead = self._dead[row // self._beams]
            allowed = [token for token, child in self._trie.children[node].items() if child not in dead]
            rows += [row] * len(allowed)
            tokens += allowed
            if self._trie.items[node] and node not in dead:
                ends.append(row)
        result = torch.full_like(scores, -torch.inf)
        result[rows, tokens] = scores[rows, tokens]
        result[ends, self._end] = 0
        return result

    def _node(self, written: NDArray[np.int64]) -> int | None:
        key = written.tobytes()
        if key not in self._nodes:
            self._nodes[key] = self._trie.node(written.tolist())
        return self._nodes[key]

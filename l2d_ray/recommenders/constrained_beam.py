"""Language-space decoding that cannot leave the catalogue: beam search along a trie of the titles' tokens.

Source: D3 (arXiv 2406.14900). Without its length normalisation, an item's score is the log-probability of its title.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from l2d_ray.config import Config
from l2d_ray.core.arrays import Float64, IntArray
from l2d_ray.core.decoding import ScoredItems
from l2d_ray.core.query import Query
from l2d_ray.recommenders.contract import Declaration, Need, Options, Recommender

if TYPE_CHECKING:  # PyTorch takes seconds to import and is not needed to check a name
    from torch import Tensor

    from l2d_ray.encoding import HistoryEncoder
    from l2d_ray.models.backbone import LanguageModel
    from l2d_ray.recommenders.generation import BeamSearch
    from l2d_ray.recommenders.resources import Resources

UNREACHABLE = -1e8
"""`generate` gives unused beams a score of -1e9. A beam that scores less than this was never found."""


class StoppedError(Exception):
    """The search was stopped because its result is not needed any more."""


@dataclass
class TitleTrie:
    """A trie of all titles as token sequences. Node 0 is the root."""

    children: list[dict[int, int]] = field(default_factory=lambda: [{}])
    """For each node, the node that each token leads to."""
    items: list[list[int]] = field(default_factory=lambda: [[]])
    """For each node, the items whose title ends there. Titles that are equal after cutting share a node."""
    below: list[int] = field(default_factory=lambda: [0])
    """For each node, the number of items that end there or further down."""

    @classmethod
    def of(cls, titles: Sequence[NDArray[np.int32]]) -> "TitleTrie":
        """Build the trie in which item i has the tokens `titles[i]`."""
        trie = cls()
        for item, tokens in enumerate(titles):
            nodes = trie.grow(tokens.tolist())
            trie.items[nodes[-1]].append(item)
            for node in nodes:
                trie.below[node] += 1
        return trie

    def grow(self, tokens: list[int]) -> list[int]:
        """Return the nodes along a sequence, from the root; add the missing ones."""
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
        """Return the node at the end of a sequence; None if no title starts with it."""
        node = 0
        for token in tokens:
            if token not in self.children[node]:
                return None
            node = self.children[node][token]
        return node


@dataclass(frozen=True)
class Guide:
    """Values that a search adds to the log-probabilities of a title's tokens."""

    steps_N: Float64
    """For each node, the value of the token that leads there."""
    ends_N: Float64
    """For each node, the value of a title's end there."""


@dataclass(frozen=True)
class ConstrainedBeam(Recommender):
    """The most probable titles of the catalogue that beam search finds. Scores are log-probabilities."""

    encoder: "HistoryEncoder"
    search: "BeamSearch"
    trie: TitleTrie
    titles: Sequence[NDArray[np.int32]]

    @classmethod
    def over(
        cls, language_model: "LanguageModel", encoder: "HistoryEncoder", num_items: int, beams: int, batch_size: int
    ) -> "ConstrainedBeam":
        """Build the recommender over the catalogue of `encoder`."""
        from l2d_ray.recommenders.generation import BeamSearch

        titles = encoder.prompts.pieces(range(num_items))
        end = language_model.backbone.tokenizer.eos_token_id
        longest = max(title.size for title in titles)
        search = BeamSearch(language_model, beams, longest + 1, [end], batch_size)
        return cls(encoder, search, TitleTrie.of(titles), titles)

    def recommend(self, queries: Sequence[Query], stopped: Callable[[], bool] = lambda: False) -> list[ScoredItems]:
        """Return the permitted items that are found. Items that are not permitted take no beam.

        Raises StoppedError as soon as `stopped()`, which is called before each token.
        """
        return self.recommend_counted(queries, stopped)[0]

    def recommend_counted(
        self, queries: Sequence[Query], stopped: Callable[[], bool] = lambda: False
    ) -> tuple[list[ScoredItems], int]:
        """Recommend, and count tokens."""
        found, tokens = self.find(queries, (), stopped)
        lists = []
        for ends, query in zip(found, queries, strict=True):
            pairs = [(item, score) for node, score in ends for item in self.trie.items[node]]
            items_I, scores_I = (np.array([pair[n] for pair in pairs]) for n in (0, 1))
            permitted = ScoredItems(items_I.astype(np.int64), scores_I).permitted(query.exclude, query.allow)
            lists.append(permitted.first(query.k))
        return lists, tokens

    def find(
        self, queries: Sequence[Query], guides: Sequence[Guide], stopped: Callable[[], bool] = lambda: False
    ) -> tuple[list[list[tuple[int, float]]], int]:
        """Return the nodes where the found titles of each query end, with their scores, the best first. Count tokens.

        `guides` has one guide for each query, or is empty. Titles of which no item is permitted take no beam.
        """
        dead = [self._dead_nodes(query.exclude, query.allow) for query in queries]
        written = self.search.continuations(
            [self.encoder.phrase(query.history, room=self.search.max_tokens) for query in queries],
            lambda batch, width: _AlongTrie(
                self.trie,
                [dead[n] for n in batch],
                [guides[n] for n in batch] if guides else [],
                self.search.beams,
                width,
                self.search.end_tokens[0],
                stopped,
            ),
        )
        found = []
        for beams in written.beams:
            ends = [(self.trie.node(tokens.tolist()), score) for tokens, score in beams if score > UNREACHABLE]
            found.append([(node, score) for node, score in ends if node is not None])
        return found, written.tokens

    def _dead_nodes(self, exclude: IntArray, allow: IntArray | None) -> set[int]:
        """Return the nodes below which no item is permitted."""
        if allow is not None:
            exclude = np.union1d(exclude, np.setdiff1d(np.arange(len(self.titles)), allow))
        excluded: dict[int, int] = {}
        for item in exclude[(exclude >= 0) & (exclude < len(self.titles))].tolist():
            for node in self.trie.grow(self.titles[item].tolist()):
                excluded[node] = excluded.get(node, 0) + 1
        return {node for node, count in excluded.items() if count == self.trie.below[node]}


class _AlongTrie:
    """Logits processor that lets each beam continue only as some title does. Where a title ends, the end is free.

    A guide adds its values to both.
    """

    def __init__(
        self,
        trie: TitleTrie,
        dead: list[set[int]],
        guides: list[Guide],
        beams: int,
        width: int,
        end: int,
        stopped: Callable[[], bool],
    ) -> None:
        self._trie, self._dead, self._guides = trie, dead, guides
        self._beams, self._width, self._end = beams, width, end
        self._stopped = stopped
        self._nodes: dict[bytes, int | None] = {}

    def __call__(self, input_ids: "Tensor", scores: "Tensor") -> "Tensor":
        if self._stopped():
            raise StoppedError
        written = input_ids[:, self._width :].cpu().numpy()
        rows, tokens, ends = [], [], []
        guided, guided_ends = [], []
        for row, beam in enumerate(written):
            node, prompt = self._node(beam), row // self._beams
            if node is None:
                continue
            dead = self._dead[prompt]
            steps = {token: child for token, child in self._trie.children[node].items() if child not in dead}
            rows += [row] * len(steps)
            tokens += list(steps)
            stops = [node] if self._trie.items[node] and node not in dead else []
            ends += [row] * len(stops)
            if self._guides:
                guided += self._guides[prompt].steps_N[list(steps.values())].tolist()
                guided_ends += self._guides[prompt].ends_N[stops].tolist()
        result = scores.new_full(scores.shape, -math.inf)
        result[rows, tokens] = scores[rows, tokens]
        result[ends, self._end] = 0
        if self._guides:
            result[rows, tokens] += scores.new_tensor(guided)
            result[ends, self._end] += scores.new_tensor(guided_ends)
        return result

    def _node(self, written: NDArray[np.int64]) -> int | None:
        key = written.tobytes()
        if key not in self._nodes:
            self._nodes[key] = self._trie.node(written.tolist())
        return self._nodes[key]


@dataclass(frozen=True)
class BeamOptions(Options):
    """The number of beams, which a name states."""

    beams: int

    @classmethod
    def read(cls, config: Config, groups: Mapping[str, str]) -> Self:
        """Return the number of beams in the name."""
        return cls(int(groups["beams"]))


def _make(options: BeamOptions, resources: "Resources") -> ConstrainedBeam:
    return ConstrainedBeam.over(
        resources.language_model,
        resources.encoder,
        len(resources.titles),
        options.beams,
        resources.config.evaluate.generation_batch_size,
    )


DECLARATION = Declaration(
    pattern=r"constrained-beam-(?P<beams>[2-9]|[1-9]\d+)",
    form="constrained-beam-<beams, at least 2>",
    examples=("constrained-beam-20",),
    options=BeamOptions,
    make=_make,
    needs=frozenset({Need.ENCODER, Need.LANGUAGE_MODEL}),
    writes_text=True,
)

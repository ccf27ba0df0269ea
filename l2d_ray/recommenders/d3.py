"""D3, debiasing-diversifying decoding: constrained beam search that a recommender without text assists.

A title's tokens are t_1 to t_n. P(t_1 .. t_j) is the assistant's probability of all items whose titles begin so. The
paper scores a title by the sum over its tokens of

    alpha log p(t_j | history, t_1 .. t_j-1) + (1 - alpha) log(P(t_1 .. t_j) / P(t_1 .. t_j-1))

and does not divide by the length. A ghost token follows from the tokens before it, so its p is near 1. It adds nothing
to the sum, but division by the length would reward it. The second terms add up to log P of the item, so

    score(i) = alpha log p(title of i | history) + (1 - alpha) log P(i)

Source: D3 (arXiv 2406.14900), its debiasing without length normalisation and its text-free assistant. The code of the
authors is at github.com/SAI990323/DecodingMatters. Differences:

- The beams always follow alpha 0.5, and alpha enters the final score alone. The values of a study so share one search.
  With `d3-0.5`, or with as many beams as titles, this is the search of the paper.
- P of a beginning is the sum over its items. The code of the authors takes the maximum, and notes both.
- The assistant is `transitions`, which needs no training, in place of SASRec.
- There are 20 beams, as many as `constrained-beam-20` has. The authors' code has 10.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.arrays import Float64, IntArray
from l2d_ray.core.decoding import ScoredItems, best_items
from l2d_ray.core.query import History, Query
from l2d_ray.recommenders.constrained_beam import ConstrainedBeam, Guide, TitleTrie
from l2d_ray.recommenders.contract import Declaration, Need
from l2d_ray.recommenders.transitions import transitions
from l2d_ray.recommenders.tuned import TunedOptions
from l2d_ray.recommenders.writing import WritingRecommender

if TYPE_CHECKING:
    from l2d_ray.recommenders.resources import Resources

BEAMS = 20
LEAST_PROBABILITY = 1e-10
"""Probability of an item that the assistant deems impossible."""


class Assistant(Protocol):
    """A recommender without text."""

    def probabilities(self, history: History) -> Float64:
        """Return the probability of each item."""


@dataclass(frozen=True)
class TitlePaths:
    """The nodes of a trie that lead to each item."""

    nodes_P: IntArray
    """Nodes of all paths, each path from the root to the end of a title."""
    items_P: IntArray
    """The item of each of these nodes."""
    ends_I: IntArray
    """The node where each item's title ends."""
    parents_N: IntArray
    """The node before each node. The root is before itself."""

    @classmethod
    def of(cls, trie: TitleTrie, titles: Sequence[NDArray[np.int32]]) -> "TitlePaths":
        """Walk the path of each item."""
        paths = [trie.grow(title.tolist()) for title in titles]
        parents_N = np.zeros(len(trie.children), np.int64)
        for path in paths:
            parents_N[path[1:]] = path[:-1]
        nodes_P = np.concatenate([np.array(path) for path in paths])
        items_P = np.repeat(np.arange(len(paths)), [len(path) for path in paths])
        return cls(nodes_P, items_P, np.array([path[-1] for path in paths]), parents_N)

    def guide(self, probabilities_I: Float64) -> Guide:
        """Return a guide that adds the log-probability of the items at its end to each title."""
        num_nodes = self.parents_N.size
        below_N = np.bincount(self.nodes_P, probabilities_I[self.items_P], num_nodes)
        here_N = np.bincount(self.ends_I, probabilities_I, num_nodes)
        with np.errstate(divide="ignore"):  # no title ends at most nodes
            return Guide(np.log(below_N / below_N[self.parents_N]), np.log(here_N / below_N))


@dataclass(frozen=True)
class FoundTitles:
    """The items whose titles a search found, with two log-probabilities for each."""

    items_I: IntArray
    by_model_I: Float64
    """Log-probability of the title, by the language model."""
    by_assistant_I: Float64
    """Log-probability of the item, by the assistant."""


@dataclass(frozen=True)
class AssistedSearch:
    """A writer of titles: constrained beam search in which both probabilities count alike."""

    beam: ConstrainedBeam
    assistant: Assistant
    paths: TitlePaths

    @classmethod
    def over(cls, beam: ConstrainedBeam, assistant: Assistant) -> "AssistedSearch":
        """Build the search over the titles of `beam`."""
        return cls(beam, assistant, TitlePaths.of(beam.trie, beam.titles))

    def write(self, queries: Sequence[Query]) -> tuple[list[FoundTitles], int]:
        """Return the titles found for each query, and count tokens."""
        probabilities = [self._probabilities(query.history) for query in queries]
        guides = [self.paths.guide(probabilities_I) for probabilities_I in probabilities]
        found, tokens = self.beam.find(queries, guides)
        return [self._found(ends, p_I) for ends, p_I in zip(found, probabilities, strict=True)], tokens

    def _probabilities(self, history: History) -> Float64:
        probabilities_I = np.maximum(self.assistant.probabilities(history), LEAST_PROBABILITY)
        result: Float64 = probabilities_I / probabilities_I.sum()
        return result

    def _found(self, ends: list[tuple[int, float]], probabilities_I: Float64) -> FoundTitles:
        """Take the guide's part out of the scores."""
        items, by_model = [], []
        for node, score in ends:
            same_title = self.beam.trie.items[node]
            items += same_title
            by_model += [score - np.log(probabilities_I[same_title].sum())] * len(same_title)
        items_I = np.array(items, np.int64)
        return FoundTitles(items_I, np.array(by_model, np.float64), np.log(probabilities_I[items_I]))


@dataclass(frozen=True)
class D3(WritingRecommender[FoundTitles]):
    """The found titles, ordered by both probabilities. Scores are weighted means of log-probabilities."""

    alpha: float
    """Weight of the language model."""

    def rank(self, written: FoundTitles, query: Query) -> ScoredItems:
        """Return the permitted items of the best scores."""
        scores_I = self.alpha * written.by_model_I + (1 - self.alpha) * written.by_assistant_I
        found = ScoredItems(written.items_I, scores_I)
        return best_items([found.permitted(query.exclude, query.allow)], query.k)


@dataclass(frozen=True)
class D3Options(TunedOptions):
    """Options of D3."""

    NAME, TUNED, VALUES, DEFAULT = "d3", "alpha", (0.1, 0.3, 0.5, 0.7, 0.9, 1.0), 0.5

    alpha: float
    """Weight of the language model, 0 to 1."""


def _assisted_search(resources: "Resources") -> AssistedSearch:
    num_items, batch_size = len(resources.titles), resources.config.evaluate.generation_batch_size
    beam = ConstrainedBeam.over(resources.language_model, resources.encoder, num_items, BEAMS, batch_size)
    return AssistedSearch.over(beam, resources.once(transitions))


DECLARATION = Declaration(
    pattern=r"d3(-(?P<alpha>0(\.\d+)?|1(\.0+)?))?",
    form="d3[-<alpha, 0 to 1>]",
    examples=("d3", "d3-0.7"),
    options=D3Options,
    make=lambda options, resources: D3(resources.once(_assisted_search), options.alpha),
    needs=frozenset({Need.ENCODER, Need.LANGUAGE_MODEL, Need.TRAINING_INTERACTIONS}),
    writes_text=True,
)

"""TGH, the transition-graph heuristic: items a few transitions away from the last items, ranked by their titles.

The graph has an edge from i to v if v followed i in a training history, c(i, v) times. Ring r around a source, one of
the last items, has the items that are r edges away and no fewer. Within a ring items are ranked by

    cos(title of the source, title of v) + EDGE_WEIGHT * log(1 + c(source, v)) / max over u of log(1 + c(source, u))

whose second term is for ring 1. Each ring has a budget, a number of places in a list of ten. The score of an item is
its ring's budget divided by its rank in the ring, and the best of these if it is in several rings.

Source: "An Embarrassingly Simple Graph Heuristic Reveals Shortcut-Solvable Benchmarks for Sequential Recommendation"
(arXiv 2605.07125), TGH-1 and TGH-2. Constants are those of its code. Differences from it:

- The paper returns ten items, ring after ring. Here the list has any length, so places are dealt by d'Hondt's method:
  the quotient budget / rank. With one source and full rings, the first ten items are the paper's in a mixed order.
- An item near both sources takes one place, its better one. The paper fills its other place with the next item.
- The paper fills the places that rings leave empty at random. Here all other items follow, ranked by the cosine.
- Titles are embedded by the workspace's model (`title_knn.py`). The paper has flan-t5-xl, and more text of an item.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from l2d_ray.core.arrays import Float64, FloatArray, IntArray
from l2d_ray.core.decoding import NO_ITEMS, ScoredItems, best_of_all
from l2d_ray.core.query import Query, known_items
from l2d_ray.data.samples import TrainingInteractions
from l2d_ray.recommenders.contract import Declaration, Need, Recommender, logits
from l2d_ray.recommenders.title_knn import title_directions
from l2d_ray.recommenders.tuned import TunedOptions

if TYPE_CHECKING:
    from l2d_ray.recommenders.resources import Resources

EDGE_WEIGHT = 0.5
BUDGETS = {1: ((7, 2, 1),), 2: ((5, 1), (3, 1))}
"""Budgets of the rings around the last item and, with two sources, around the one before, by the number of sources."""


def transition_graph(interactions: TrainingInteractions, num_items: int) -> sparse.csr_array:
    """Return the graph [I, I]; the value of an edge is the second term of the module's formula."""
    pairs = interactions.lasts, interactions.targets
    graph_II = sparse.csr_array((np.ones(pairs[0].size), pairs), shape=(num_items, num_items))
    graph_II.sum_duplicates()  # in place
    weights = np.log1p(graph_II.data)
    largest_I = np.zeros(num_items)
    sources = np.repeat(np.arange(num_items), np.diff(graph_II.indptr))
    np.maximum.at(largest_I, sources, weights)
    graph_II.data = EDGE_WEIGHT * weights / largest_I[sources]
    return graph_II


def rings(graph_II: sparse.csr_array, source: int, count: int) -> Iterator[IntArray]:
    """Yield the items of rings 1 to `count` around a source, ascending. Ring 1 has the source if it followed itself."""
    reached_I = np.zeros(graph_II.shape[0], np.bool_)
    ring = np.array([source])
    for _ in range(count):
        following_I = np.zeros_like(reached_I)
        following_I[graph_II[ring].indices] = True
        ring = np.flatnonzero(following_I & ~reached_I)
        reached_I[ring] = reached_I[source] = True
        yield ring


@dataclass(frozen=True)
class TransitionRings(Recommender):
    """Scores above 0 are quotients budget / rank, all others cosines minus 1."""

    graph_II: sparse.csr_array
    titles_ID: FloatArray
    """Embeddings of length 1."""
    budgets: tuple[tuple[int, ...], ...]
    """Budgets of the rings around the last item, the one before, and so on."""

    def recommend(self, queries: Sequence[Query]) -> list[ScoredItems]:
        """Return the permitted items of the best scores; none if the catalogue knows no item of the history."""
        lists = []
        for query in queries:
            sources = known_items(query.history, len(self.titles_ID))[: -len(self.budgets) - 1 : -1].tolist()
            scores_I = self._scores(sources) if sources else None
            lists.append(NO_ITEMS if scores_I is None else best_of_all(scores_I, query.k, query.exclude, query.allow))
        return lists

    def _scores(self, sources: Sequence[int]) -> Float64:
        cosines_SI = (self.titles_ID[sources] @ self.titles_ID.T).astype(np.float64)
        scores_I: Float64 = np.minimum(cosines_SI[0], 1) - 1
        for source, cosines_I, budgets in zip(sources, cosines_SI, self.budgets, strict=False):
            edges = self.graph_II[[source]]
            cosines_I[edges.indices] += edges.data
            for ring, budget in zip(rings(self.graph_II, source, len(budgets)), budgets, strict=True):
                ranked = ring[np.argsort(-cosines_I[ring], kind="stable")]
                scores_I[ranked] = np.maximum(scores_I[ranked], budget / np.arange(1, ranked.size + 1))
        return scores_I


@dataclass(frozen=True)
class RingOptions(TunedOptions):
    """Options of TGH."""

    NAME, TUNED, VALUES, DEFAULT = "tgh", "sources", (1, 2), 1

    sources: int
    """Number of last items around which there are rings."""


def _graph(resources: "Resources") -> sparse.csr_array:
    return transition_graph(resources.training_interactions, len(resources.titles))


DECLARATION = Declaration(
    pattern=r"tgh(-(?P<sources>[12]))?",
    form="tgh[-<1 or 2 last items>]",
    examples=("tgh", "tgh-2"),
    options=RingOptions,
    make=lambda options, resources: TransitionRings(
        resources.once(_graph), resources.once(title_directions), BUDGETS[options.sources]
    ),
    needs=frozenset({Need.TRAINING_INTERACTIONS, Need.TITLE_STATES}),
    log_scores=logits,
)

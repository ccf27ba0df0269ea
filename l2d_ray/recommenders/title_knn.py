"""The items whose titles are most similar to those of the last items: what a language model knows without interactions.

A title's embedding is the model's last hidden state after the title alone. The model is the workspace's: as published,
or fine-tuned if jobs/finetune.py has run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from l2d_ray.core.arrays import FloatArray
from l2d_ray.core.decoding import NO_ITEMS, ScoredItems, best_of_all
from l2d_ray.core.query import Query, indexed_items
from l2d_ray.recommenders.contract import Declaration, Need, Recommender, logits
from l2d_ray.recommenders.tuned import TunedOptions

if TYPE_CHECKING:
    from l2d_ray.recommenders.resources import Resources


@dataclass(frozen=True)
class TitleKnn(Recommender):
    """Scores are cosines between a title's embedding and the mean embedding of the last items' titles."""

    titles_ID: FloatArray
    """Embeddings of length 1."""
    last_items: int

    def recommend(self, queries: Sequence[Query]) -> list[ScoredItems]:
        """Return the permitted items of the highest cosines. Titles that the catalogue does not know are skipped."""
        lists = []
        for query in queries:
            known = indexed_items(query.history)[-self.last_items :]
            found = NO_ITEMS
            if known.size:
                mean_D = of_length_one(self.titles_ID[known].mean(axis=0, dtype=np.float64))
                scores_I = self.titles_ID @ mean_D.astype(self.titles_ID.dtype)
                found = best_of_all(scores_I, query.k, query.exclude, query.allow)
            lists.append(found)
        return lists


@dataclass(frozen=True)
class TitleOptions(TunedOptions):
    """Options of the search by titles."""

    NAME, TUNED, VALUES, DEFAULT = "title-knn", "last_items", (1, 3, 10), 1

    last_items: int


def of_length_one(vectors: FloatArray) -> FloatArray:
    """Return the vectors [..., D] scaled to length 1; a vector of zeros stays."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    result: FloatArray = vectors / np.where(norms > 0, norms, 1)
    return result


def title_directions(resources: "Resources") -> FloatArray:
    """Return the embeddings of length 1. `Resources.once` shares them among recommenders."""
    return of_length_one(resources.title_states_ID)


DECLARATION = Declaration(
    pattern=r"title-knn(-(?P<last_items>[1-9]\d*))?",
    form="title-knn[-<last items>]",
    examples=("title-knn", "title-knn-3"),
    options=TitleOptions,
    make=lambda options, resources: TitleKnn(resources.once(title_directions), options.last_items),
    needs=frozenset({Need.TITLE_STATES}),
    log_scores=logits,
)

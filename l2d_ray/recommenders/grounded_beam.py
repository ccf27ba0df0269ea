"""Language-space decoding that writes freely: one title by beam search, then the items whose titles are nearest to it.

Source: BIGRec (arXiv 2308.08434) without popularity; `bigrec` adds it. As there, the beam is 4 wide, its first text is
taken, and the distance is L2 between the last-layer states of this text and of each title.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.arrays import Float64, FloatArray
from l2d_ray.core.decoding import NO_ITEMS, ScoredItems, best_of_all, squared_distances
from l2d_ray.core.packing import Prompts
from l2d_ray.core.query import Query
from l2d_ray.recommenders.contract import Declaration, Need, Options
from l2d_ray.recommenders.writing import WritingRecommender

if TYPE_CHECKING:  # PyTorch takes seconds to import and is not needed to check a name
    from l2d_ray.encoding import HistoryEncoder
    from l2d_ray.models.backbone import LanguageModel
    from l2d_ray.recommenders.generation import BeamSearch
    from l2d_ray.recommenders.resources import Resources

BEAMS = 4


@dataclass(frozen=True)
class GroundedTitle:
    """A writer of one title for each query, with its distance to every title of the catalogue.

    The distances of a query are scaled to 0 for the nearest item and 1 for the farthest.
    """

    encoder: "HistoryEncoder"
    search: "BeamSearch"
    title_states_ID: FloatArray

    @classmethod
    def over(
        cls, language_model: "LanguageModel", encoder: "HistoryEncoder", num_items: int, batch_size: int
    ) -> "GroundedTitle":
        """Build the writer over the catalogue of `encoder`."""
        from l2d_ray.recommenders.generation import BeamSearch

        search = BeamSearch.of_titles(language_model, encoder, num_items, BEAMS, batch_size)
        return cls(encoder, search, encoder.title_states(num_items))

    def write(self, queries: Sequence[Query]) -> tuple[list[Float64], int]:
        """Return the distances [I] of each query; none if the model writes no token at all. Count tokens."""
        prompts = [self.encoder.phrase(query.history, room=self.search.max_tokens) for query in queries]
        written = self.search.continuations(prompts)
        texts = [np.append(beams[0][0], self.encoder.prompts.item_end) for beams in written.beams]
        states, tokens = self._states([text for text in texts if text.size])
        near = iter(states)
        distances = [
            _scaled(np.sqrt(squared_distances(next(near), self.title_states_ID))) if text.size else np.empty(0)
            for text in texts
        ]
        return distances, written.tokens + tokens

    def _states(self, texts: Sequence[NDArray[np.int32]]) -> tuple[FloatArray, int]:
        if not texts:
            return np.empty((0, 0)), 0
        result = self.encoder.extract(Prompts.join(texts))
        return result.states.numpy(), result.tokens


@dataclass(frozen=True)
class GroundedBeam(WritingRecommender[Float64]):
    """The catalogue ordered by distance to the title that the model writes. Scores are weight / scaled distance."""

    weights_I: Float64
    """At least 1 each."""

    def rank(self, written: Float64, query: Query) -> ScoredItems:
        """Return the permitted items whose titles are nearest, given the distances."""
        if not written.size:
            return NO_ITEMS
        with np.errstate(divide="ignore"):
            return best_of_all(self.weights_I / written, query.k, query.exclude, query.allow)


def grounded_title(resources: "Resources") -> GroundedTitle:
    """Make the writer. `Resources.once` shares it among recommenders."""
    return GroundedTitle.over(
        resources.language_model,
        resources.encoder,
        len(resources.titles),
        resources.config.evaluate.generation_batch_size,
    )


def _scaled(distances_I: Float64) -> Float64:
    distances_I -= np.fmin.reduce(distances_I)  # without those of titles whose states are not finite
    distances_I /= np.fmax.reduce(distances_I) or 1
    return distances_I


DECLARATION = Declaration(
    pattern="grounded-beam",
    form="grounded-beam",
    examples=("grounded-beam",),
    options=Options,
    make=lambda _, resources: GroundedBeam(resources.once(grounded_title), np.ones(len(resources.titles))),
    needs=frozenset({Need.ENCODER, Need.LANGUAGE_MODEL}),
    writes_text=True,
)

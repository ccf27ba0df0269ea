"""Language-space decoding that writes freely: one title by beam search, then the items whose titles are nearest to it.

Source: BIGRec (arXiv 2308.08434). As there, the beam is 4 wide, its first text is taken, and the distance is L2
between the last-layer states of this text and of each title.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.arrays import FloatArray
from l2d_ray.core.decoding import NO_ITEMS, ScoredItems, best_items, scores_of, squared_distances
from l2d_ray.core.packing import Prompts
from l2d_ray.core.query import Query
from l2d_ray.recommenders.contract import Declaration, Need, Options, Recommender

if TYPE_CHECKING:  # PyTorch takes seconds to import and is not needed to check a name
    from l2d_ray.encoding import HistoryEncoder
    from l2d_ray.models.backbone import LanguageModel
    from l2d_ray.recommenders.generation import BeamSearch

BEAMS = 4


@dataclass(frozen=True)
class GroundedBeam(Recommender):
    """The catalogue ordered by distance to the title that the model writes. Scores are 1 / distance."""

    encoder: "HistoryEncoder"
    search: "BeamSearch"
    title_states_ID: FloatArray

    @classmethod
    def over(
        cls, language_model: "LanguageModel", encoder: "HistoryEncoder", num_items: int, batch_size: int
    ) -> "GroundedBeam":
        """Build the recommender over the catalogue of `encoder`."""
        from l2d_ray.recommenders.generation import BeamSearch

        titles = encoder.prompts.pieces(range(num_items))
        # The token that follows a title in an item's form, by default a line break, ends a title, too.
        ends = {language_model.backbone.tokenizer.eos_token_id, *encoder.prompts.item_end[:1].tolist()}
        longest = max(title.size for title in titles)
        search = BeamSearch(language_model, BEAMS, longest, sorted(ends), batch_size)
        return cls(encoder, search, encoder.title_states(num_items))

    def recommend(self, queries: Sequence[Query]) -> list[ScoredItems]:
        """Return the permitted items whose titles are nearest; none if the model writes no token at all."""
        return self.recommend_counted(queries)[0]

    def recommend_counted(self, queries: Sequence[Query]) -> tuple[list[ScoredItems], int]:
        """Recommend, and count tokens."""
        prompts = [self.encoder.phrase(query.history, room=self.search.max_tokens) for query in queries]
        written = self.search.continuations(prompts)
        texts = [np.append(beams[0][0], self.encoder.prompts.item_end) for beams in written.beams]
        states, tokens = self._states([text for text in texts if text.size])
        near, lists = iter(states), []
        for text, query in zip(texts, queries, strict=True):
            found = NO_ITEMS
            if text.size:
                scores_I = scores_of(squared_distances(next(near), self.title_states_ID))
                found = ScoredItems(np.arange(scores_I.size), scores_I).permitted(query.exclude, query.allow)
            lists.append(best_items([found], query.k))
        return lists, written.tokens + tokens

    def _states(self, texts: Sequence[NDArray[np.int32]]) -> tuple[FloatArray, int]:
        if not texts:
            return np.empty((0, 0)), 0
        result = self.encoder.extract(Prompts.join(texts))
        return result.states.numpy(), result.tokens


DECLARATION = Declaration(
    pattern="grounded-beam",
    form="grounded-beam",
    examples=("grounded-beam",),
    options=Options,
    make=lambda _, resources: GroundedBeam.over(
        resources.language_model,
        resources.encoder,
        len(resources.titles),
        resources.config.evaluate.generation_batch_size,
    ),
    needs=frozenset({Need.ENCODER, Need.LANGUAGE_MODEL}),
    writes_text=True,
)

"""Language-space decoding that writes freely: one title by beam search, then the items whose titles are nearest to it.

Source: BIGRec (arXiv 2308.08434): beam 4, the first beam, and L2 distance between the last-layer states of what was
written and of each title.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.arrays import Float64, FloatArray, IntArray
from l2d_ray.core.decoding import NO_ITEMS, ScoredItems, best_items, scores_of, squared_distances
from l2d_ray.core.packing import Prompts
from l2d_ray.encoding import HistoryEncoder
from l2d_ray.models.backbone import LanguageModel
from l2d_ray.recommenders.contract import EXCLUDE_SEEN, Filters, as_arrays
from l2d_ray.recommenders.generation import BeamSearch

BEAMS = 4


@dataclass(frozen=True)
class GroundedBeam:
    """The catalogue in the order of its distance to the one title that the model writes."""

    encoder: HistoryEncoder
    search: BeamSearch
    title_states_ID: FloatArray

    @classmethod
    def over(
        cls, language_model: LanguageModel, encoder: HistoryEncoder, num_items: int, batch_size: int
    ) -> "GroundedBeam":
        """Over the catalogue that `encoder` phrases."""
        titles = encoder.prompts.pieces(range(num_items))
        # What every item's form goes on with (by default a line break) ends a title, too.
        ends = {language_model.backbone.tokenizer.eos_token_id, *encoder.prompts.item_end[:1].tolist()}
        longest = max(title.size for title in titles)
        states = encoder.extract(Prompts.join(titles)).states.numpy()
        return cls(encoder, BeamSearch(language_model, BEAMS, longest, sorted(ends), batch_size), states)

    def recommend(
        self, histories: Sequence[NDArray[np.int32]], k: int, filters: Filters = EXCLUDE_SEEN
    ) -> tuple[IntArray, Float64]:
        """As in `Recommender`; scores are 1 / distance."""
        prompts = [self.encoder.phrase(history, room=self.search.max_tokens) for history in histories]
        written = [beams[0][0] for beams in self.search.continuations(prompts)]
        # An item's form may be no more than its title: then nothing written is a text of no tokens, near to no title.
        texts = [np.append(tokens, self.encoder.prompts.item_end) for tokens in written]
        near = iter(self._states([text for text in texts if text.size]))
        lists = []
        for text, out in zip(texts, filters.excluded(histories), strict=True):
            found = NO_ITEMS
            if text.size:
                scores_I = scores_of(squared_distances(next(near), self.title_states_ID))
                found = ScoredItems(np.arange(scores_I.size), scores_I).permitted(out, filters.allow)
            lists.append(best_items([found], k))
        return as_arrays(lists, k)

    def _states(self, texts: Sequence[NDArray[np.int32]]) -> FloatArray:
        if not texts:
            return np.empty((0, 0))
        result = self.encoder.extract(Prompts.join(texts))
        self.search.tokens += result.tokens
        return result.states.numpy()

"""GPT4Rec: beam search writes several search queries, and BM25 finds the items whose titles match them.

The queries take turns, the most probable one first. In each turn a query gives its best item that no query has given
before. The first K items of a list therefore have K/m items of each of m queries, for every K that m divides. A query
whose items are used up gives no more. An item that no query matches is not recommended, so a list can be short.

Source: GPT4Rec (arXiv 2304.03879), its beam search for queries and its retrieval of K/m items for each. Differences:

- A list is made for every K at once, by turns. The paper makes one for each K, query after query.
- Filters apply after the turns, so that they change no score. Of the first K permitted items a query can then have more
  or fewer than K/m.
- BM25 has the defaults of bm25s: Lucene's variant, k1 = 1.5 and b = 0.75. The paper tunes both.
- A word is any run of letters and digits, in lower case. There are no stop words, and "3" in "Toy Story 3" is a word.
- Prompt, model and training are those of the workspace, for all recommenders alike. The paper fine-tunes GPT-2.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from l2d_ray.core.arrays import IntArray
from l2d_ray.core.decoding import ScoredItems
from l2d_ray.core.query import Query
from l2d_ray.recommenders.constrained_beam import BeamOptions
from l2d_ray.recommenders.contract import Declaration, Need
from l2d_ray.recommenders.writing import WritingRecommender

if TYPE_CHECKING:  # PyTorch takes seconds to import and is not needed to check a name
    from l2d_ray.encoding import HistoryEncoder
    from l2d_ray.recommenders.generation import BeamSearch
    from l2d_ray.recommenders.resources import Resources

WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class TitleIndex:
    """A BM25 index of titles."""

    bm25: Any
    """A bm25s.BM25, or None if no title has a word."""

    @classmethod
    def of(cls, titles: Sequence[str]) -> "TitleIndex":
        """Index the titles."""
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.NOTSET)  # its import sets DEBUG
        words = [_words(title) for title in titles]
        if not any(words):
            return cls(None)
        bm25 = bm25s.BM25()
        bm25.index(words, show_progress=False)
        return cls(bm25)

    def ranking(self, text: str) -> IntArray:
        """Return the items whose titles have a word of the text, the best match first; of equal ones the smaller."""
        words = _words(text)
        if self.bm25 is None or not words:
            return np.empty(0, np.int64)
        scores_I = self.bm25.get_scores(words)
        order_I = np.argsort(-scores_I, kind="stable")
        matching: IntArray = order_I[scores_I[order_I] > 0].astype(np.int64)
        return matching


@dataclass(frozen=True)
class QueryWriter:
    """A writer of search queries: free beam search, one query for each beam."""

    encoder: "HistoryEncoder"
    search: "BeamSearch"

    def write(self, queries: Sequence[Query]) -> tuple[list[list[str]], int]:
        """Return the texts for each history, the most probable first, and count tokens."""
        prompts = [self.encoder.phrase(query.history, room=self.search.max_tokens) for query in queries]
        written = self.search.continuations(prompts)
        decode = self.search.language_model.backbone.tokenizer.decode
        texts = [[decode(tokens.tolist(), skip_special_tokens=True) for tokens, _ in beams] for beams in written.beams]
        return texts, written.tokens


@dataclass(frozen=True)
class Gpt4Rec(WritingRecommender[list[str]]):
    """The items that match the written queries, in turns. An item's score is 1 / its place among all of the turns."""

    index: TitleIndex

    def rank(self, written: list[str], query: Query) -> ScoredItems:
        """Return the first permitted items."""
        items_I = np.fromiter(in_turns([self.index.ranking(text) for text in written]), np.int64)
        found = ScoredItems(items_I, 1 / np.arange(1, items_I.size + 1))
        return found.permitted(query.exclude, query.allow).first(query.k)


def in_turns(rankings: Sequence[IntArray]) -> Iterator[int]:
    """Yield all items, each once: the rankings take turns, and each gives its best item that was not given before."""
    given: set[int] = set()
    remaining = [iter(ranking.tolist()) for ranking in rankings]
    while remaining:
        for ranking in list(remaining):
            item = next((item for item in ranking if item not in given), None)
            if item is None:
                remaining.remove(ranking)
            else:
                given.add(item)
                yield item


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _title_index(resources: "Resources") -> TitleIndex:
    return TitleIndex.of(resources.titles)


def _make(options: BeamOptions, resources: "Resources") -> Gpt4Rec:
    from l2d_ray.recommenders.generation import BeamSearch

    search = BeamSearch.of_titles(
        resources.language_model,
        resources.encoder,
        len(resources.titles),
        options.beams,
        resources.config.evaluate.generation_batch_size,
    )
    return Gpt4Rec(QueryWriter(resources.encoder, search), resources.once(_title_index))


DECLARATION = Declaration(
    pattern=r"gpt4rec-(?P<beams>[2-9]|[1-9]\d+)",
    form="gpt4rec-<beams, at least 2>",
    examples=("gpt4rec-20",),
    options=BeamOptions,
    make=_make,
    needs=frozenset({Need.ENCODER, Need.LANGUAGE_MODEL}),
    writes_text=True,
)

"""The Python interface: recommend from a workspace in this process, without Ray.

import l2d_ray

recommender = l2d_ray.load("workspace")
recommender.recommend(["50", "181"], k=10)
recommender.recommend_many({"ann": ["50", "181"], "ben": [{"title": "Alien (1979)"}]})
l2d_ray.read_memory("workspace").to_table()
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
from pydantic import ValidationError

from l2d_ray.command_line import explained
from l2d_ray.config import Config
from l2d_ray.core.decoding import ScoredItems
from l2d_ray.core.query import Query
from l2d_ray.data.dataset import Dataset
from l2d_ray.encoding import HistoryEncoder, identify_memory
from l2d_ray.errors import InputError
from l2d_ray.index.aggregations import check_name, l2d_posterior
from l2d_ray.index.sharding import ShardedIndex
from l2d_ray.memory.deletions import open_rows
from l2d_ray.memory.store import MemoryStore
from l2d_ray.records import check_query
from l2d_ray.serve.explanations import Explainer
from l2d_ray.serve.recommenders import L2D, find_served, make, weights_of
from l2d_ray.serve.releases import Release
from l2d_ray.serve.schemas import Explanation
from l2d_ray.stages.settings import for_queries
from l2d_ray.workspace import Workspace

Item = str | Mapping[str, str]
"""An item of a history: its id, or `{"title": …}` for an item that the catalogue does not know."""
BATCH = 256
"""Histories that are encoded together."""
COLUMNS = ["user", "rank", "item_id", "title", "score"]
Answers = Callable[[Sequence[Query]], list[ScoredItems]]
Explains = Callable[[Query, ScoredItems], Sequence[Explanation | None]]
Loaded = tuple[Config, pa.Table, Answers, Explains | None]
"""Settings in force, items of the catalogue, answers to queries, and explanations of them, of L2D alone."""


@dataclass(frozen=True)
class Recommendation:
    """A recommended item."""

    item_id: str
    title: str
    score: float
    """L2D: 1 / distance. With a prior, L2D-G's distance includes the item's log-frequency. The aggregation "posterior"
    gives the natural logarithm of the item's probability. Higher is better."""
    explanation: Explanation | None = None
    """The reasons for the score, if `recommend` was called with `explain`."""


def load(
    workspace: str | os.PathLike[str], settings: Mapping[str, Any] | None = None, *, recommender: str = L2D
) -> "WorkspaceRecommender":
    """Load the model and the index of a workspace, a folder or URI, to recommend in this process.

    All settings come from the workspace: those of its memory, and of the index that jobs/build_index.py built last.
    `settings`, by dotted key, choose among what the workspace holds: `{"index.snapshot": 1}`. They also say what it
    cannot know: `{"workers.gpus": 1}` for a GPU, `{"model.name": "/new/place"}` for a model that was moved.

    `recommender` loads another one than L2D, such as "sasrec" after jobs/train.py: a name of evaluate.recommenders that
    writes no text. It reads the dataset, needs no index, and ignores `aggregation` and `top_m`.

    Raises InputError if something is missing or damaged, or if a setting contradicts the workspace.
    """
    return WorkspaceRecommender(_configure(workspace, settings or {}), recommender)


def read_memory(workspace: str | os.PathLike[str], snapshot: int | None = None) -> ds.Dataset:
    """Return the rows of a memory's snapshot (None: the newest) as a pyarrow dataset, read as they are used.

    Columns: sample_id, user_hash, item_index, timestamp, hidden_state, and unit if rows were erased since the last
    compaction. A state is binary, the bytes of a float16 vector; `l2d_ray.schema.hidden_states` turns a batch of rows
    into an array. Raises InputError if there is no memory.
    """
    place = Workspace.open(os.fspath(workspace))
    store = MemoryStore(place)
    return open_rows(place, store.live_units(store.snapshot(snapshot)))


class WorkspaceRecommender:
    """L2D over the index of a workspace, or another recommender of it. Holds the model and the index."""

    def __init__(self, config: Config, recommender: str = L2D) -> None:
        """Load L2D with the model and the index that `config` names, or another recommender. Raises as `load` does."""
        loaded = _load_l2d(config) if recommender == L2D else _load_other(recommender, config)
        self.config, items, self._answer, self._explain = loaded
        """The settings in force, recorded ones included."""
        self._ids: list[str] = items["item_id"].to_pylist()
        self._titles: list[str] = items["title"].to_pylist()
        self._indices = {item_id: index for index, item_id in enumerate(self._ids)}

    @property
    def items(self) -> pd.DataFrame:
        """The catalogue: `item_id` and `title`."""
        return pd.DataFrame({"item_id": self._ids, "title": self._titles})

    def recommend(
        self,
        history: Sequence[Item],
        k: int = 10,
        *,
        aggregation: str = "global",
        top_m: int | None = None,
        exclude_seen: bool | None = None,
        deny: Iterable[str] = (),
        allow: Iterable[str] | None = None,
        explain: bool = False,
    ) -> list[Recommendation]:
        """Return the k best items after a history, best first; fewer if no more are permitted.

        `history` holds item ids in time order, at least one; `{"title": …}` stands for an item that the catalogue does
        not know. `aggregation` is "global" (L2D-G), "local" (L2D-L, over the `top_m` nearest memory rows) or
        "posterior" (L2D with transitions, by probability). With `exclude_seen`, items of the history are not
        recommended. `deny` and `allow` hold item ids that must not, or may only, be recommended; unknown ones are
        ignored. None takes recommend.top_m or recommend.exclude_seen.

        `explain` needs aggregation "posterior". Each recommendation then says how much of its score comes from the
        model's state, from the last items and from popularity. It names the nearest training sequences, too.

        Raises InputError for an unknown item, an empty history, or an option that is out of range.
        """
        options = self._options(k, aggregation, top_m, exclude_seen, deny, allow)
        if explain and (self._explain is None or aggregation != l2d_posterior.NAME):
            raise InputError(
                f"explain=True: explains only L2D with aggregation={l2d_posterior.NAME!r}; give that, or leave it out"
            )
        query = Query.after(self._parse(history, "history"), **options)
        (found,) = self._answer([query])
        explanations = self._explain(query, found) if explain and self._explain else [None] * len(found)
        return [Recommendation(*row, of_row) for row, of_row in zip(self._rows(found), explanations, strict=True)]

    def recommend_many(
        self,
        histories: Mapping[Any, Sequence[Item]] | pd.Series | Iterable[Sequence[Item]],
        k: int = 10,
        *,
        aggregation: str = "global",
        top_m: int | None = None,
        exclude_seen: bool | None = None,
        deny: Iterable[str] = (),
        allow: Iterable[str] | None = None,
    ) -> pd.DataFrame:
        """Return the k best items after each of many histories, which run packed, in batches.

        `histories` maps users to histories: a mapping, or a pandas Series of lists. The users of a plain sequence are
        0, 1, … Columns: user, rank (from 1), item_id, title, score; one row per recommendation. Options and errors are
        those of `recommend`.
        """
        options = self._options(k, aggregation, top_m, exclude_seen, deny, allow)
        users, queries = [], []
        for user, history in _by_user(histories):
            users.append(user)
            queries.append(Query.after(self._parse(history, f"histories[{user!r}]"), **options))
        rows: list[tuple[Any, ...]] = []
        for start in range(0, len(queries), BATCH):
            found = self._answer(queries[start : start + BATCH])
            for user, scored in zip(users[start:], found, strict=False):
                rows += [(user, rank, *row) for rank, row in enumerate(self._rows(scored), start=1)]
        frame = pd.DataFrame(rows, columns=COLUMNS)
        return frame.astype({"rank": np.int64, "score": np.float64})

    def _rows(self, found: ScoredItems) -> Iterator[tuple[str, str, float]]:
        for item, score in zip(found.items_I.tolist(), found.scores_I.tolist(), strict=True):
            yield self._ids[item], self._titles[item], score

    def _options(
        self,
        k: int,
        aggregation: str,
        top_m: int | None,
        exclude_seen: bool | None,
        deny: Iterable[str],
        allow: Iterable[str] | None,
    ) -> dict[str, Any]:
        """Return the options of a query. Raises InputError for one that is out of range."""
        defaults = self.config.recommend
        return {
            "k": _positive("k", k),
            "aggregation": check_name(aggregation),
            "top_m": _positive("top_m", defaults.top_m if top_m is None else top_m),
            "exclude_seen": defaults.exclude_seen if exclude_seen is None else bool(exclude_seen),
            "deny": self._known("deny", deny),
            "allow": None if allow is None else self._known("allow", allow),
        }

    def _known(self, name: str, item_ids: Iterable[str]) -> Any:
        """Return the indices of those ids that the catalogue knows, ascending."""
        if isinstance(item_ids, str):
            raise InputError(f"{name}={item_ids!r}: a string, not a list of item ids; give [{item_ids!r}]")
        return np.unique(np.array([self._indices[i] for i in item_ids if i in self._indices], np.int64))

    def _parse(self, history: Any, where: str) -> list[int | str]:
        """Return item indices, and titles as they are. Raises InputError, which begins with `where`."""
        if isinstance(history, str | Mapping | Set) or not isinstance(history, Iterable):
            raise InputError(f"{where}={history!r}: not a list of items; give item ids, such as ['50', '181']")
        parsed: list[int | str] = []
        unknown: dict[str, None] = {}
        for number, item in enumerate(history):
            if not isinstance(item, str):
                parsed.append(_title(item, f"{where}[{number}]"))
            elif item in self._indices:
                parsed.append(self._indices[item])
            else:
                unknown[item] = None
        if unknown:
            raise InputError(
                f"{where}: unknown items: {', '.join([*unknown][:20])}{', …' if len(unknown) > 20 else ''}; give ids of"
                " this workspace's items, or {'title': …} for an item that it does not know"
            )
        if not parsed:
            raise InputError(f"{where}: empty; give at least one item")
        return parsed


def _load_l2d(config: Config) -> Loaded:
    """Return the settings, the items and the answers of L2D."""
    release = Release.plan(config)
    reader, config, items = release.open(), release.config, release.items()
    check_query(reader.manifest.identity, identify_memory(config))
    ids, titles = (items[name].to_pylist() for name in ("item_id", "title"))
    encoder = HistoryEncoder(config, titles)
    index = ShardedIndex.open(reader.workspace, release.index).with_prior(config.index.prior_in(reader.manifest.space))
    explainer = Explainer(reader.workspace, reader.manifest.dataset, ids, titles)

    def answer(queries: Sequence[Query]) -> list[ScoredItems]:
        return index.recommend(encoder.encode([query.history for query in queries]).states_UD, queries)

    def explain(query: Query, found: ScoredItems) -> Sequence[Explanation | None]:
        (state_D,) = encoder.encode([query.history]).states_UD
        return explainer.explain(found.items_I.tolist(), index.explain(state_D, query.history, found))

    return config, items, answer, explain


def _load_other(name: str, config: Config) -> Loaded:
    """Return the settings, the items and the answers of another recommender."""
    config = for_queries(config)
    dataset, named = Dataset.open(Workspace.open(config.workspace)), find_served(name, config, "recommender")
    weights_of(named, dataset, config)
    return config, dataset.items(), make(named, config).recommend, None


def _configure(workspace: str | os.PathLike[str], settings: Mapping[str, Any]) -> Config:
    try:
        return Config(workspace=os.fspath(workspace)).replace(dict(settings))
    except ValidationError as error:
        raise explained(error, "settings") from None


def _by_user(histories: Any) -> Iterable[tuple[Any, Any]]:
    """Return (user, history) pairs. Raises InputError for what holds no histories."""
    if isinstance(histories, Mapping | pd.Series):
        return histories.items()
    if isinstance(histories, str | pd.DataFrame) or not isinstance(histories, Iterable):
        raise InputError(
            f"histories: a {type(histories).__name__}, not a list of histories; give a list of lists of item ids, a"
            " mapping, or one column of a DataFrame"
        )
    return enumerate(histories)


def _title(item: Any, where: str) -> str:
    """Return the title of `{"title": …}`. Raises InputError for anything else."""
    if isinstance(item, Mapping) and list(item) == ["title"] and isinstance(item["title"], str) and item["title"]:
        return str(item["title"])
    if isinstance(item, int | np.integer) and not isinstance(item, bool):
        raise InputError(f"{where}={item}: item ids are strings; give {str(item)!r}")
    raise InputError(f"{where}={item!r}: no item; give an item id (a string) or {{'title': …}}")


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise InputError(f"{name}={value!r}: not a positive whole number; give 1 or more")
    return int(value)

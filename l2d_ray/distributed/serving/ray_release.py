"""A release that answers queries by the components of an endpoint."""

import asyncio
import time
from typing import Any

from l2d_ray.core.query import Query
from l2d_ray.core.samples import last_window
from l2d_ray.distributed.serving.components import Components
from l2d_ray.distributed.serving.metrics import milliseconds_since
from l2d_ray.index import aggregations
from l2d_ray.index.aggregations import l2d_posterior
from l2d_ray.serve.catalogue import ItemCatalogue
from l2d_ray.serve.engine import Answer
from l2d_ray.serve.explanations import Explainer
from l2d_ray.serve.recommenders import L2D
from l2d_ray.serve.releases import Release

INLINE_DIMENSION = 1024
"""Hidden size up to which the map of the index runs in the event loop (0.1 ms at 576); above, in a thread."""


class RayRelease:
    """A `ServedRelease` on Ray Serve."""

    def __init__(self, release: Release, components: Components) -> None:
        """Read what a gateway needs of the release. Raises InputError if the release is missing or damaged."""
        reader, config = release.open(), release.config
        identity = reader.manifest.identity
        self.version = release.version
        self.snapshot = release.index.removeprefix("index/").rpartition("/")[0]
        self.model = identity.base_model[:12] + (f"+{identity.adapter[:12]}" if identity.adapter else "")
        self.recommenders = {L2D: self.model} | {
            name: name + (f"+{weights[:12]}" if weights else "") for name, weights in release.recommenders.items()
        }
        self.aggregations = aggregations.offered(reader.posterior is not None)
        self.catalogue = ItemCatalogue(release.items())
        self._explainer = Explainer(
            reader.workspace, reader.manifest.dataset, self.catalogue.ids, self.catalogue.titles
        )
        self._log_probabilities = release.log_probabilities
        self.top_m, self.exclude_seen = config.recommend.top_m, config.recommend.exclude_seen
        self._manifest, self._space, self._window = reader.manifest, reader.space, config.history
        self._components = components

    async def recommend(self, query: Query, recommender: str = L2D) -> Answer:
        """Answer one query by L2D, or by a recommender next to it."""
        if recommender != L2D:
            return await self._recommend_by(recommender, query)
        components, shards = self._components, len(self._manifest.shards)
        with components.metrics.request(self.version, "recommend", components.settings.deadline_seconds) as outcomes:
            started = time.perf_counter()
            state_D = await components.encode(self.version, query.history, self._session(query))
            encode_ms = milliseconds_since(started)
            if state_D.size > INLINE_DIMENSION:
                query_UD = await asyncio.to_thread(self._space, state_D[None])
            else:
                query_UD = self._space(state_D[None])
            items, missing = await components.search(self.version, shards, query, query_UD)
            explanations = None
            if query.explain:
                explained, unexplained = await components.explain(self.version, shards, query, query_UD, items)
                missing = sorted({*missing, *unexplained})
                explanations = await asyncio.to_thread(self._explainer.explain, items.items_I.tolist(), explained)
            total_ms = milliseconds_since(started)
            outcomes.append("partial" if missing else "ok")
        components.metrics.phases(encode=encode_ms, search=total_ms - encode_ms, total=total_ms)
        return Answer(
            items,
            encode_ms,
            total_ms - encode_ms,
            missing,
            log_probabilities=query.aggregation == l2d_posterior.NAME,
            explanations=explanations,
        )

    async def _recommend_by(self, name: str, query: Query) -> Answer:
        """Answer one query by a recommender next to L2D."""
        components = self._components
        with components.metrics.request(self.version, name, components.settings.deadline_seconds) as outcomes:
            started = time.perf_counter()
            items = await components.recommend_by(self.version, name, query)
            outcomes.append("ok")
        known = name in self._log_probabilities
        return Answer(items, 0.0, milliseconds_since(started), model=self.recommenders[name], log_probabilities=known)

    async def beam_search(self, query: Query) -> Answer:
        """Answer one query by constrained beam search."""
        components = self._components
        with components.metrics.request(self.version, "beam_search", components.settings.beam_seconds) as outcomes:
            started = time.perf_counter()
            items = await components.search_beams(self.version, query)
            outcomes.append("ok")
        return Answer(items, milliseconds_since(started), 0.0)

    def status(self) -> dict[str, Any]:
        """Return further facts about the release for people and monitors."""
        manifest = self._manifest
        return {
            "items": len(self.catalogue.ids),
            "rows": manifest.rows,
            "items_with_rows": manifest.items,
            "shards": len(manifest.shards),
            "space": manifest.space,
            "factory": manifest.factory,
            "quality": manifest.quality.model_dump(),
            "top_m": self.top_m,
            "beams": self._components.settings.beams,
        }

    def _session(self, query: Query) -> str:
        """Return the first item of the window. It stays the same while a returning user's window keeps its start."""
        window = last_window(len(query.history), self._window.max_items, self._window.stride)
        return str(query.history[window][0])

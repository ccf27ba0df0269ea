"""The replica that promotes a newer index by itself (`serve.follow`)."""

import asyncio
import logging
import time

from l2d_ray.config import Config
from l2d_ray.distributed.serving.promotion import OtherPromotionError, promote_release
from l2d_ray.serve.following import NewestIndex
from l2d_ray.serve.release_cache import ReleaseCache, ReleaseReplica
from l2d_ray.serve.releases import ReleaseFile

logger = logging.getLogger(__name__)
RETRY_SECONDS = 60
"""Seconds until a promotion that failed is tried again."""


class Follower(ReleaseReplica):
    """A replica that looks for a newer index at each health check of Ray Serve, every few seconds."""

    def __init__(self, file: ReleaseFile, config: Config) -> None:
        """Hold nothing of a release. Raises InputError if there is no memory."""
        self.cache: ReleaseCache[None] = ReleaseCache(file, lambda _: None)
        self._newest = NewestIndex(file, config)
        self._search: asyncio.Future[None] | None = None

    async def check_health(self) -> None:
        """Start a refresh, and a search for a newer index unless one is under way."""
        await super().check_health()
        if self._search is None or self._search.done():
            self._search = asyncio.ensure_future(asyncio.to_thread(self._follow))

    def _follow(self) -> None:
        """Promote a newer index. The served one stays if that fails, and the next attempt waits.

        If jobs/promote.py changes what is served meanwhile, that stays.
        """
        try:
            if release := self._newest.take():
                result = promote_release(release)
                logger.info("%s: served now, in place of %s", result.index, result.previous_index)
        except OtherPromotionError as error:
            logger.warning("the newest index is not followed: %s", error)
        except Exception as error:  # whatever it is, the endpoint has to go on
            logger.warning("cannot follow the newest index, trying again in %d s: %s", RETRY_SECONDS, error)
            self._newest.offer_again()
            time.sleep(RETRY_SECONDS)

"""Recommend with a large language model without generating a token (L2D, arXiv 2509.11524), on Ray.

    import l2d_ray

    recommender = l2d_ray.load("workspace")              # the workspace that the jobs in jobs/ made
    recommender.recommend(["50", "181"], k=10)           # list of Recommendation(item_id, title, score)
    recommender.recommend_many(histories, k=10)          # pandas DataFrame
    l2d_ray.read_memory("workspace")                     # pyarrow dataset of hidden states

Importing the package does nothing else: what is named above is imported when it is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l2d_ray.api import Recommendation, WorkspaceRecommender, load, read_memory
    from l2d_ray.errors import InputError

__version__ = "0.1.0"
__all__ = ["InputError", "Recommendation", "WorkspaceRecommender", "load", "read_memory"]


def __getattr__(name: str) -> Any:
    """Import a name of the Python interface when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from l2d_ray import api

    return getattr(api, name)


def __dir__() -> list[str]:
    """Return the names of the Python interface, too."""
    return sorted([*globals(), *__all__])

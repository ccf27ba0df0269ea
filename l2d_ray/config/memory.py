"""Settings of the memory, of its index, and of recommending from it."""

from typing import Literal

from pydantic import Field

from l2d_ray.config.section import Folder, Section


class MemoryConfig(Section):
    """The memory: the store of hidden states."""

    num_shards: int = Field(4, ge=1)
    """Number of shards. All rows of an item are in shard hash(item) mod num_shards."""
    units: int | None = Field(None, ge=1)
    """Number of units: slices of the histories that are committed one by one. null: one per 100,000 samples but at
    least 64, so that a crash loses little and a cluster has enough work to share."""
    sample_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the training samples to keep. The samples of 0.3 are a subset of those of 0.5. Samples that share a
    window's beginning are kept together, so that tokens are saved in proportion."""


class IndexConfig(Section):
    """The index of a memory. Several indexes of one memory can exist; these settings also choose one of them."""

    snapshot: int | None = Field(None, ge=1)
    """Number of the memory snapshot. null: the newest to build, the last one that was built to serve."""
    space: Literal["none", "centre", "whiten-total", "whiten-within"] = "whiten-within"
    """Linear map before distances are taken. `none` is plain L2, as in the paper. `whiten-within` divides by the
    within-item covariance; L2D-G finds most with it (jobs/RESULTS.md). All are described in l2d_ray/core/space.py."""
    shrinkage: float = Field(0.01, ge=0, le=1)
    """Shrinkage of the covariance towards a multiple of the identity."""
    prior: float | None = Field(None, ge=0)
    """Weight of an item's log-frequency in L2D-G: score by -1/2 distance^2 + prior * log(rows of the item). null: 2 in
    the space whiten-within, else 0. Linear discriminant analysis has 1; validation data prefer 2 (jobs/RESULTS.md)."""
    factory: str = "auto"
    """FAISS factory string for the rows of a shard. Flat, SQfp16, HNSW32 and "IVF4096,PQ64" are examples. auto: exact
    up to 100,000 rows in a shard, inverted lists above, compressed above 5,000,000."""
    target_recall: float = Field(0.995, gt=0, le=1)
    """Share of the exact top K that an approximate index must find, for M up to 1,000. The search is widened until it
    does."""
    sample_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the memory's rows to index, chosen by sample id. The rows of 0.3 are a subset of those of 0.5."""
    half_life_days: float | None = Field(None, gt=0)
    """Days in which the weight of a row halves, in item means and in the priors of L2D-G and `l2d`. Ages count from the
    newest row. null: all rows weigh the same. Of L2D-L, only items change that complete a list. Validation samples
    choose it (jobs/RESULTS.md)."""
    max_drift: float = Field(0.1, ge=0)
    """Movement of the memory beyond which the map of an older snapshot's index is fitted anew, with `posterior`. It is
    the change of the memory's covariance, as a share, or of its mean (l2d_ray/core/space.py). 0: always."""
    max_segments: int = Field(8, ge=1)
    """Segments of a shard. The rows of newer snapshots are in segments apart (l2d_ray/stages/index_growth.py);
    beyond this number, all rows become one again. 1 does so at once."""
    parameters_from: Folder | None = None
    """Workspace from whose index the parameters of `l2d` are taken, instead of fitting them. It is for datasets
    without validation samples (data.split=none), which otherwise get the defaults."""

    def prior_in(self, space: str) -> float:
        """Return the prior's weight in this space."""
        if self.prior is None:
            return 2.0 if space == "whiten-within" else 0.0
        return self.prior


class RecommendConfig(Section):
    """Defaults of a request to L2D."""

    top_m: int = Field(200, ge=1)
    """M of L2D-L: number of nearest memory rows to aggregate. jobs/evaluate.py finds the best on validation data."""
    exclude_seen: bool = True
    """Do not recommend items of the history."""

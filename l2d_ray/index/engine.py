"""The contract of a vector search engine, and the engine in use.

An engine proposes candidates; `VectorSearch` takes their exact distances. Another engine is one module that satisfies
`VectorEngine`, bound to the name `engine` below.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.arrays import IntArray
from l2d_ray.index import faiss_engine

Float32 = NDArray[np.float32]


class Candidates(Protocol):
    """Vectors numbered from 0, and a search for those near a query.

    A search setting trades effort for recall. Unless the methods are overridden, there is nothing to set.
    """

    @property
    def count(self) -> int:
        """Number of vectors."""
        ...

    @property
    def exhaustive(self) -> bool:
        """Whether a search compares the query with every vector, in float32."""
        ...

    def search(self, queries_UD: Float32, count: int) -> tuple[Float32, IntArray]:
        """Return [U, count] squared distances, ascending, and vector numbers; -1 where there are fewer vectors."""
        ...

    def narrowest_search(self) -> str:
        """Return the setting of least effort; "" if there is nothing to set."""
        return ""

    def wider_searches(self, setting: str) -> list[str]:
        """Return the settings that are one step wider than `setting`."""
        return []

    def set_search(self, setting: str) -> None:
        """Search with this setting from now on."""
        return


class CandidateIndex(Candidates, Protocol):
    """Candidates that can be built and stored."""

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        ...

    def training_rows(self) -> int:
        """Return the number of vectors to train on; 0 if no training is needed."""
        ...

    def train(self, vectors_ND: Float32) -> None:
        """Train on a sample of vectors. Raises ValueError with the reason if that fails."""
        ...

    def add(self, vectors_ND: Float32) -> None:
        """Add vectors after those that are there. Raises ValueError with the reason if that fails."""
        ...

    def to_bytes(self) -> bytes:
        """Return the content of an index file."""
        ...


class VectorEngine(Protocol):
    """A vector search engine: a module with these names at its top level.

    A factory string describes an index in the notation of the engine (`index.factory`).
    """

    NAME: str
    VERSION: str

    def default_factory(self, rows: int, dimension: int) -> str:
        """Return the factory string for a shard of this size."""
        ...

    def complete_factory(self, factory: str, rows: int, dimension: int) -> str:
        """Return the factory string with the sizes that it leaves out."""
        ...

    def create(self, factory: str, dimension: int) -> CandidateIndex:
        """Return an empty index. Raises InputError if the factory string is invalid or does not fit the dimension."""
        ...

    def bytes_per_vector(self, factory: str, dimension: int) -> int:
        """Return the bytes that a vector adds to an index. Raises InputError as `create` does."""
        ...

    def create_exhaustive(self, dimension: int) -> CandidateIndex:
        """Return an empty index whose search is exhaustive."""
        ...

    def from_bytes(self, content: bytes) -> CandidateIndex:
        """Return the index that `to_bytes` wrote. Raises ValueError if the content is damaged or of a newer version."""
        ...

    def scan(self, queries_UD: Float32, vectors_ND: Float32, count: int) -> tuple[Float32, IntArray]:
        """Return what `Candidates.search` returns, from comparing the queries with all vectors."""
        ...

    def set_threads(self, threads: int) -> None:
        """Set the number of threads of this process that search and build."""
        ...


engine: VectorEngine = faiss_engine

"""Nearest vectors with exact distances, whatever index proposes the candidates.

The engine finds candidates, possibly in compressed vectors. Their distances are then taken in float64 from the vectors
themselves. So an approximate index can miss candidates, but every score is exact.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from l2d_ray.core.arrays import Float64, FloatArray, IntArray
from l2d_ray.core.decoding import squared_distances
from l2d_ray.index.engine import Candidates, Float32, engine

MAX_K_FACTOR, MAX_MORE_CANDIDATES = 64, 16_384
_MARGIN = 32
_ROUNDING = 1e-5
"""Bound on the error of a float32 squared distance, relative to the squared lengths it is computed from."""
_ROWS_PER_BLOCK = 65_536


@dataclass
class VectorSearch:
    """Vectors, and candidates among them: `candidates` holds vector n, less `offset_D`, as number n."""

    candidates: Candidates
    vectors_ND: FloatArray
    offset_D: Float64
    """Subtracted before the engine sees a vector: short vectors have more precise float32 distances."""
    extra_N: Float64 | None = None
    """Added to the squared distances; `candidates` holds its square root as one more dimension."""
    k_factor: int = 1
    """Number of candidates per vector wanted. Raises the recall where codes confuse vectors, like k_factor of FAISS's
    IndexRefine."""

    @classmethod
    def over(cls, vectors_ND: FloatArray, offset_D: Float64, extra_N: Float64 | None = None) -> "VectorSearch":
        """Return an exact search over vectors that fit into memory in float32."""
        extra = np.empty((len(vectors_ND), 0)) if extra_N is None else np.sqrt(extra_N)[:, None]
        index = engine.create_exhaustive(vectors_ND.shape[1] + extra.shape[1])
        for rows, block in _blocks(vectors_ND, offset_D):
            index.add(np.hstack([block, extra[rows].astype(np.float32)]))
        return cls(index, vectors_ND, offset_D, extra_N)

    @classmethod
    def scan(cls, vectors_ND: FloatArray, offset_D: Float64) -> "VectorSearch":
        """Return an exact search over any number of vectors, with which others are compared."""
        return cls(BlockScan(vectors_ND, offset_D), vectors_ND, offset_D)

    def wider_searches(self, setting: str) -> list[str]:
        """Return the settings one step wider: the engine searches more, or gives more candidates (`k_factor`)."""
        narrow, k_factor = _split(setting)
        options = [(wide, k_factor) for wide in self.candidates.wider_searches(narrow)]
        if k_factor < MAX_K_FACTOR:
            options.append((narrow, 2 * k_factor))
        return [",".join(filter(None, [wide, f"k_factor={factor}" * (factor > 1)])) for wide, factor in options]

    def set_search(self, setting: str) -> None:
        """Search with a setting of `Candidates.narrowest_search` or `wider_searches` from now on."""
        narrow, self.k_factor = _split(setting)
        self.candidates.set_search(narrow)

    def search(self, queries_UD: FloatArray, count: int) -> list[tuple[IntArray, Float64]]:
        """Return for each query vector numbers and their exact squared distances, in no particular order.

        These are at least the `count` nearest vectors, or as many as there are or an approximate index finds. If the
        candidates are exhaustive, every vector as near as the last of these is included. A query that is not finite
        gets none.
        """
        results: list[tuple[IntArray, Float64]] = [(np.empty(0, np.int64), np.empty(0))] * len(queries_UD)
        prepared = self._prepared(queries_UD)
        pending, wanted = np.flatnonzero(np.isfinite(prepared).all(axis=1)), self._candidates_for(count)
        while pending.size and count and self.candidates.count:
            wanted = min(wanted, self.candidates.count)
            seen, found = self.candidates.search(prepared[pending], wanted)
            unsure = []
            for user, numbers, farthest in zip(pending, found, seen[:, -1], strict=True):
                numbers = np.sort(numbers[numbers >= 0])
                results[user] = numbers, self.distances(queries_UD[user], numbers)
                complete = not self.candidates.exhaustive or wanted == self.candidates.count
                if not complete and farthest <= self._reach(queries_UD[user], results[user][1], count):
                    unsure.append(user)
            pending, wanted = np.array(unsure, np.int64), 4 * wanted
        return results

    def distances(self, query_D: FloatArray, numbers: IntArray) -> Float64:
        """Return the exact squared distances of some vectors."""
        distances_N = squared_distances(query_D, self.vectors_ND[numbers])
        return distances_N if self.extra_N is None else distances_N + self.extra_N[numbers]

    def _candidates_for(self, count: int) -> int:
        """Return the number of candidates to request. A client chooses `count`, so the factor is bounded."""
        return count + min((self.k_factor - 1) * count, MAX_MORE_CANDIDATES) + _MARGIN

    def _prepared(self, queries_UD: FloatArray) -> Float32:
        """Return the queries as the candidates are stored."""
        prepared = (queries_UD - self.offset_D).astype(np.float32)
        return prepared if self.extra_N is None else np.pad(prepared, ((0, 0), (0, 1)))

    def _reach(self, query_D: FloatArray, distances_N: Float64, count: int) -> float:
        """Return an upper bound on the float32 distance of the `count`-th nearest vector."""
        last = float(np.partition(distances_N, count - 1)[count - 1])
        length = float(np.linalg.norm(query_D - self.offset_D))
        return float(last + _ROUNDING * (length**2 + (length + last**0.5) ** 2))


@dataclass(frozen=True)
class BlockScan(Candidates):
    """An exhaustive search over vectors that stay where they are, for instance on disk, and are read block by block."""

    vectors_ND: FloatArray
    offset_D: Float64
    exhaustive = True

    @property
    def count(self) -> int:
        """Number of vectors."""
        return len(self.vectors_ND)

    def search(self, queries_UD: Float32, count: int) -> tuple[Float32, IntArray]:
        """Return [U, count] squared distances of the nearest vectors, ascending, and their numbers."""
        near, found = np.empty((len(queries_UD), 0), np.float32), np.empty((len(queries_UD), 0), np.int64)
        for rows, block in _blocks(self.vectors_ND, self.offset_D):
            distances, numbers = engine.scan(queries_UD, block, min(count, len(block)))
            near, found = np.hstack([near, distances]), np.hstack([found, numbers + rows.start])
            keep = np.argsort(near, axis=1, kind="stable")[:, :count]
            near, found = np.take_along_axis(near, keep, axis=1), np.take_along_axis(found, keep, axis=1)
        return near, found


def _blocks(vectors_ND: FloatArray, offset_D: Float64) -> Iterator[tuple[slice, Float32]]:
    """Yield the vectors less the offset in float32, block by block."""
    for start in range(0, len(vectors_ND), _ROWS_PER_BLOCK):
        rows = slice(start, start + _ROWS_PER_BLOCK)
        yield rows, (vectors_ND[rows].astype(np.float64) - offset_D).astype(np.float32)


def _split(setting: str) -> tuple[str, int]:
    """Return the engine's part of a setting, and the factor (`nprobe=4,k_factor=2`)."""
    narrow, _, k_factor = setting.partition("k_factor=")
    return narrow.removesuffix(","), int(k_factor or 1)

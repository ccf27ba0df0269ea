"""Nearest vectors with FAISS: any factory string, exact distances.

FAISS finds candidates, whatever it compresses; their distances are then taken in float64 from the vectors themselves,
so that what an index loses is candidates only, never the precision of a score.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.arrays import Float64, FloatArray, IntArray
from l2d_ray.core.decoding import squared_distances
from l2d_ray.errors import InputError

EXHAUSTIVE = "Flat"
"""The factory string whose candidates are all there are, ties included."""
EXACT_BELOW_ROWS = 100_000
"""Rows of a shard up to which `auto` scans them all: 31 ms a query of dimension 576 (jobs/RESULTS.md), a quarter
of what encoding the query takes there, or less."""
COMPRESSED_ABOVE_ROWS = 5_000_000
TRAINING_ROWS_PER_MEAN = 64
"""FAISS's k-means warns below 39 and takes at most 256; the mean of 64 vectors is placed well enough."""
MOST_EF_SEARCH, MOST_K_FACTOR, MOST_MORE_CANDIDATES = 4096, 64, 16_384
_MARGIN = 32
_ROUNDING = 1e-5
"""Bound on the error of a float32 squared distance, relative to the squared lengths it is computed from."""
_ROWS_PER_BLOCK = 65_536


def default_factory(rows: int, dimension: int) -> str:
    """The index for a shard of so many rows: exact while that is quick, then inverted lists, then compressed ones."""
    if rows <= EXACT_BELOW_ROWS:
        return "Flat"
    if rows <= COMPRESSED_ABOVE_ROWS:
        return f"IVF{inverted_lists(rows)},SQfp16"
    return f"IVF{inverted_lists(rows)}_HNSW32,PQ{code_bytes(dimension)}"


def inverted_lists(rows: int) -> int:
    """About 4 sqrt(rows), as FAISS's guidelines have it, and a power of two."""
    return int(2 ** round(np.log2(4 * np.sqrt(rows))))


def code_bytes(dimension: int) -> int:
    """Bytes of a product-quantised vector: at most 64, and a divisor of the dimension, as FAISS wants it."""
    return max(size for size in range(1, 65) if dimension % size == 0)


def empty_index(factory: str, dimension: int) -> Any:
    """An index without vectors. Raises InputError for a string FAISS does not understand or that does not fit."""
    try:
        index = faiss.index_factory(dimension, factory)
    except RuntimeError as error:
        raise InputError(
            f"index.factory={factory!r}: FAISS makes no index of dimension {dimension} from it ({reason(error)}); see"
            " the index factory in FAISS's documentation"
        ) from None
    if isinstance(index, faiss.IndexIDMap):
        raise InputError(f"index.factory={factory!r}: rows are numbered already; leave out IDMap")
    if hasattr(_inner(index), "do_polysemous_training"):
        # Orders the codes of a product quantiser for a search by Hamming distance, which is not used here, and takes
        # 50 times longer than the training itself.
        _inner(index).do_polysemous_training = False
    return index


def reason(error: RuntimeError) -> str:
    """What FAISS says, without where in its source."""
    return re.sub(r"^Error in .* at \S+: (Error: )?", "", str(error).splitlines()[0])


def training_rows(index: Any) -> int:
    """How many vectors to train an index on; 0 if it needs no training."""
    if index.is_trained:
        return 0
    inverted, quantizer = faiss.try_extract_index_ivf(index), getattr(_inner(index), "pq", None)
    means = max(inverted.nlist if inverted else 0, quantizer.ksub if quantizer else 0)
    return max(TRAINING_ROWS_PER_MEAN * means, 50_000)


def train(index: Any, vectors_ND: FloatArray) -> None:
    """Train on a sample of vectors; on all GPUs where faiss-gpu finds some (k-means is most of the work)."""
    inverted = faiss.try_extract_index_ivf(index)
    if inverted and _gpus():
        inverted.clustering_index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(inverted.d))
    index.train(vectors_ND.astype(np.float32))


def adding_to(index: Any) -> Callable[[NDArray[np.float32]], None]:
    """What adds vectors to an index. Where faiss-gpu finds GPUs, they find the inverted list of a vector: that is most
    of the work, unless the means of the lists have a graph of their own (IVF…_HNSW32)."""
    means = faiss.downcast_index(index.quantizer) if isinstance(index, faiss.IndexIVF) else None
    if not (_gpus() and isinstance(means, faiss.IndexFlat)):
        return index.add  # type: ignore[no-any-return]
    on_gpus = faiss.index_cpu_to_all_gpus(means)

    def add(vectors_ND: NDArray[np.float32]) -> None:
        _, lists_N1 = on_gpus.search(vectors_ND, 1)
        index.add_core(len(vectors_ND), faiss.swig_ptr(vectors_ND), None, faiss.swig_ptr(lists_N1))

    return add


def _gpus() -> int:
    return int(faiss.get_num_gpus()) if hasattr(faiss, "index_cpu_to_all_gpus") else 0


def narrowest_search(index: Any) -> str:
    """The search setting of least effort, in FAISS's notation; "" if FAISS has nothing to set."""
    inner = _inner(index)
    if isinstance(inner, faiss.IndexIVF):
        return "nprobe=1"
    return "efSearch=256" if isinstance(inner, faiss.IndexHNSW) else ""


def wider_searches(index: Any, setting: str) -> list[str]:
    """The settings one step wider: more of the index is searched, or more of what that finds is looked at exactly
    (`k_factor`, of ours, as of FAISS's IndexRefine: what codes confuse costs recall however much is searched).
    """
    values = _values(setting)
    values.setdefault("k_factor", 1)
    most = {"nprobe": getattr(_inner(index), "nlist", 1), "efSearch": MOST_EF_SEARCH, "k_factor": MOST_K_FACTOR}
    return [
        ",".join(f"{name}={value}" for name, value in wider.items() if (name, value) != ("k_factor", 1))
        for name in values
        if (wider := values | {name: min(2 * values[name], most[name])}) != values
    ]


def _values(setting: str) -> dict[str, int]:
    return {name: int(value) for name, _, value in (part.partition("=") for part in setting.split(",") if part)}


def _inner(index: Any) -> Any:
    """The index behind a rotation of the vectors (OPQ, PCA) or under a refinement of its results."""
    while isinstance(index, faiss.IndexPreTransform | faiss.IndexRefine):
        index = faiss.downcast_index(index.index if isinstance(index, faiss.IndexPreTransform) else index.base_index)
    return index


def to_bytes(index: Any) -> bytes:
    """The index as FAISS writes it to a file."""
    return bytes(faiss.serialize_index(index).tobytes())


def from_bytes(content: bytes) -> Any:
    """The index that `to_bytes` wrote. Raises ValueError if it is not one, or one of a newer FAISS."""
    try:
        return faiss.deserialize_index(np.frombuffer(content, np.uint8))
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[0][:200]) from None


@dataclass
class VectorSearch:
    """Vectors, and an index that finds candidates among them. `index` holds vector n, less `offset_D`, under id n."""

    index: Any
    vectors_ND: FloatArray
    offset_D: Float64
    """Subtracted before FAISS sees a vector: float32 distances are only as precise as the vectors are short."""
    exhaustive: bool
    extra_N: Float64 | None = None
    """Added to the squared distances; `index` then holds its square root as one dimension more."""
    k_factor: int = 1
    """So many times the vectors that are wanted are FAISS's candidates."""

    @classmethod
    def over(cls, vectors_ND: FloatArray, offset_D: Float64, extra_N: Float64 | None = None) -> "VectorSearch":
        """An exact search over vectors that fit into memory in float32."""
        extra = np.empty((len(vectors_ND), 0)) if extra_N is None else np.sqrt(extra_N)[:, None]
        index = faiss.IndexFlatL2(vectors_ND.shape[1] + extra.shape[1])
        for rows, block in blocks(vectors_ND, offset_D):
            index.add(np.hstack([block, extra[rows].astype(np.float32)]))
        return cls(index, vectors_ND, offset_D, True, extra_N)

    @classmethod
    def scan(cls, vectors_ND: FloatArray, offset_D: Float64) -> "VectorSearch":
        """An exact search over vectors of any number: the yardstick of the others."""
        return cls(BlockScan(vectors_ND, offset_D), vectors_ND, offset_D, True)

    def set_search(self, setting: str) -> None:
        """Search as `narrowest_search` or one of `wider_searches` says."""
        values = _values(setting)
        self.k_factor = values.pop("k_factor", 1)
        parameters: Any = faiss.ParameterSpace()
        for name, value in values.items():
            parameters.set_index_parameter(self.index, name, value)

    def search(self, queries_UD: FloatArray, count: int) -> list[tuple[IntArray, Float64]]:
        """For each query vector numbers and their exact squared distances, in no order.

        At least the `count` nearest (fewer if there are not so many, or if an approximate index finds no more); of an
        exhaustive index also every vector as near as the last of those. None for a query that is not finite.
        """
        results: list[tuple[IntArray, Float64]] = [(np.empty(0, np.int64), np.empty(0))] * len(queries_UD)
        prepared = self._prepared(queries_UD)
        pending, wanted = np.flatnonzero(np.isfinite(prepared).all(axis=1)), self._candidates(count)
        while pending.size and count and self.index.ntotal:
            wanted = min(wanted, self.index.ntotal)
            seen, found = self.index.search(prepared[pending], wanted)
            unsure = []
            for user, numbers, farthest in zip(pending, found, seen[:, -1], strict=True):
                numbers = np.sort(numbers[numbers >= 0])
                results[user] = numbers, self.distances(queries_UD[user], numbers)
                complete = not self.exhaustive or wanted == self.index.ntotal
                if not complete and farthest <= self._reach(queries_UD[user], results[user][1], count):
                    unsure.append(user)
            pending, wanted = np.array(unsure, np.int64), 4 * wanted
        return results

    def _candidates(self, count: int) -> int:
        """How many to ask FAISS for: not `k_factor` times any count, which is a client's to choose."""
        return count + min((self.k_factor - 1) * count, MOST_MORE_CANDIDATES) + _MARGIN

    def distances(self, query_D: FloatArray, numbers: IntArray) -> Float64:
        """Exact squared distances of some vectors."""
        distances_N = squared_distances(query_D, self.vectors_ND[numbers])
        return distances_N if self.extra_N is None else distances_N + self.extra_N[numbers]

    def _prepared(self, queries_UD: FloatArray) -> NDArray[np.float32]:
        """The queries as `index` wants them."""
        prepared = (queries_UD - self.offset_D).astype(np.float32)
        return prepared if self.extra_N is None else np.pad(prepared, ((0, 0), (0, 1)))

    def _reach(self, query_D: FloatArray, distances_N: Float64, count: int) -> float:
        """What float32 may make of the distance of the `count`-th nearest vector, at most."""
        last = float(np.partition(distances_N, count - 1)[count - 1])
        length = float(np.linalg.norm(query_D - self.offset_D))
        return float(last + _ROUNDING * (length**2 + (length + last**0.5) ** 2))


def blocks(vectors_ND: FloatArray, offset_D: Float64) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """The vectors less the offset in float32, some rows at a time, as FAISS takes them."""
    for start in range(0, len(vectors_ND), _ROWS_PER_BLOCK):
        rows = slice(start, start + _ROWS_PER_BLOCK)
        yield rows, (vectors_ND[rows].astype(np.float64) - offset_D).astype(np.float32)


@dataclass(frozen=True)
class BlockScan:
    """What `IndexFlatL2` is, over vectors that stay where they are and are looked at block by block."""

    vectors_ND: FloatArray
    offset_D: Float64

    @property
    def ntotal(self) -> int:
        """Vectors."""
        return len(self.vectors_ND)

    def search(self, queries_UD: NDArray[np.float32], count: int) -> tuple[NDArray[np.float32], IntArray]:
        """[U, count] squared distances of the nearest vectors, ascending, and their numbers."""
        near, found = np.empty((len(queries_UD), 0), np.float32), np.empty((len(queries_UD), 0), np.int64)
        for rows, block in blocks(self.vectors_ND, self.offset_D):
            distances, numbers = faiss.knn(queries_UD, block, min(count, len(block)))
            near, found = np.hstack([near, distances]), np.hstack([found, numbers + rows.start])
            keep = np.argsort(near, axis=1, kind="stable")[:, :count]
            near, found = np.take_along_axis(near, keep, axis=1), np.take_along_axis(found, keep, axis=1)
        return near, found

"""FAISS as the vector search engine: the only module that imports it. Implements `engine.VectorEngine`."""

import re
from functools import cached_property
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.arrays import IntArray
from l2d_ray.errors import InputError

NAME, VERSION = "FAISS", faiss.__version__

EXACT_BELOW_ROWS = 100_000
"""Rows of a shard up to which `auto` scans them all. That takes 31 ms a query of dimension 576 (jobs/RESULTS.md), a
quarter of the time to encode the query, or less."""
COMPRESSED_ABOVE_ROWS = 5_000_000
TRAINING_ROWS_PER_MEAN = 64
"""FAISS's k-means warns below 39 and takes at most 256."""
MIN_TRAINING_ROWS = 50_000
MIN_EF_SEARCH, MAX_EF_SEARCH = 256, 4096


def default_factory(rows: int, dimension: int) -> str:
    """Return an exact index while that is quick, then inverted lists, then compressed vectors."""
    if rows <= EXACT_BELOW_ROWS:
        return "Flat"
    return complete_factory("IVF,SQfp16" if rows <= COMPRESSED_ABOVE_ROWS else "IVF_HNSW32,PQ", rows, dimension)


def complete_factory(factory: str, rows: int, dimension: int) -> str:
    """Return the factory string with the number of inverted lists after IVF, and the code bytes after a final PQ."""
    completed = re.sub(r"IVF(?=[,_])", f"IVF{inverted_lists(rows)}", factory)
    return f"{completed}{code_bytes(dimension)}" if completed.endswith("PQ") else completed


def inverted_lists(rows: int) -> int:
    """Return about 4 sqrt(rows), as FAISS's guidelines recommend, rounded to a power of two."""
    return int(2 ** round(np.log2(4 * np.sqrt(rows))))


def code_bytes(dimension: int) -> int:
    """Return the bytes of a product-quantised vector: the largest divisor of the dimension up to 64."""
    return max(size for size in range(1, 65) if dimension % size == 0)


class FaissIndex:
    """An index of FAISS. Implements `engine.CandidateIndex`."""

    def __init__(self, index: Any) -> None:
        """Wrap an `faiss.Index`."""
        self._index = index

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return int(self._index.d)

    @property
    def count(self) -> int:
        """Number of vectors."""
        return int(self._index.ntotal)

    @property
    def exhaustive(self) -> bool:
        """Whether it is a plain `Flat`, which compares a query with every vector."""
        return type(self._index) in (faiss.IndexFlat, faiss.IndexFlatL2)

    @cached_property
    def _inner(self) -> Any:
        """The index behind a rotation of the vectors (OPQ, PCA) or under a refinement of its results."""
        index = self._index
        while isinstance(index, faiss.IndexPreTransform | faiss.IndexRefine):
            index = faiss.downcast_index(
                index.index if isinstance(index, faiss.IndexPreTransform) else index.base_index
            )
        return index

    def training_rows(self) -> int:
        """Return the number of vectors to train on; 0 if no training is needed."""
        if self._index.is_trained:
            return 0
        inverted, quantizer = faiss.try_extract_index_ivf(self._index), getattr(self._inner, "pq", None)
        means = max(inverted.nlist if inverted else 0, quantizer.ksub if quantizer else 0)
        return max(TRAINING_ROWS_PER_MEAN * means, MIN_TRAINING_ROWS)

    def train(self, vectors_ND: NDArray[np.float32]) -> None:
        """Train on a sample of vectors, with k-means on all GPUs where faiss-gpu finds any."""
        inverted = faiss.try_extract_index_ivf(self._index)
        if inverted and _gpus():
            inverted.clustering_index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(inverted.d))
        if hasattr(self._inner, "do_polysemous_training"):
            # This training orders the codes of a product quantiser for a search by Hamming distance, which is not used
            # here. It takes 50 times longer than the rest.
            self._inner.do_polysemous_training = False
        try:
            self._index.train(vectors_ND)
        except RuntimeError as error:
            raise ValueError(_reason(error)) from None

    def add(self, vectors_ND: NDArray[np.float32]) -> None:
        """Add vectors after those that are there. GPUs find the inverted list of each, where faiss-gpu finds any."""
        try:
            if self._lists_on_gpus is None:
                self._index.add(vectors_ND)
            else:
                _, lists_N1 = self._lists_on_gpus.search(vectors_ND, 1)
                pointers = faiss.swig_ptr(vectors_ND), None, faiss.swig_ptr(lists_N1)
                self._index.add_core(len(vectors_ND), *pointers)
        except RuntimeError as error:
            raise ValueError(_reason(error)) from None

    @cached_property
    def _lists_on_gpus(self) -> Any | None:
        """The means of the inverted lists on GPUs. None without GPUs, or if the means have a graph (IVF…_HNSW32)."""
        means = faiss.downcast_index(self._index.quantizer) if isinstance(self._index, faiss.IndexIVF) else None
        return faiss.index_cpu_to_all_gpus(means) if _gpus() and isinstance(means, faiss.IndexFlat) else None

    def search(self, queries_UD: NDArray[np.float32], count: int) -> tuple[NDArray[np.float32], IntArray]:
        """Return [U, count] squared distances, ascending, and vector numbers; -1 where fewer are found."""
        distances_UN, numbers_UN = self._index.search(queries_UD, count)
        return distances_UN, numbers_UN

    def narrowest_search(self) -> str:
        """Return the setting of least effort, in FAISS's notation."""
        if isinstance(self._inner, faiss.IndexIVF):
            return "nprobe=1"
        return f"efSearch={MIN_EF_SEARCH}" if isinstance(self._inner, faiss.IndexHNSW) else ""

    def wider_searches(self, setting: str) -> list[str]:
        """Return the setting with its value doubled, unless that is the largest already."""
        if not setting:
            return []
        name, _, value = setting.partition("=")
        wider = min(2 * int(value), self._inner.nlist if name == "nprobe" else MAX_EF_SEARCH)
        return [f"{name}={wider}"] if wider != int(value) else []

    def set_search(self, setting: str) -> None:
        """Search with this setting from now on."""
        if setting:
            name, _, value = setting.partition("=")
            faiss.ParameterSpace().set_index_parameter(self._index, name, int(value))

    def to_bytes(self) -> bytes:
        """Return the content of an index file."""
        return bytes(faiss.serialize_index(self._index).tobytes())


def create(factory: str, dimension: int) -> FaissIndex:
    """Return an empty index. Raises InputError if FAISS rejects the factory string or it does not fit the dimension."""
    try:
        index = faiss.index_factory(dimension, factory)
    except RuntimeError as error:
        raise InputError(
            f"index.factory={factory!r}: FAISS cannot make an index of dimension {dimension} from it"
            f" ({_reason(error)}); see the index factory in FAISS's documentation"
        ) from None
    if isinstance(index, faiss.IndexIDMap):
        raise InputError(f"index.factory={factory!r}: rows are numbered already; leave out IDMap")
    return FaissIndex(index)


def bytes_per_vector(factory: str, dimension: int) -> int:
    """Return the bytes of a vector's code, and of its id in an inverted list or of its links in a graph."""
    index = create(factory, dimension)._index
    return _bytes_per_vector(index)  # `index` owns what follows, which must not end before it


def _bytes_per_vector(index: Any) -> int:
    if isinstance(index, faiss.IndexPreTransform):
        return _bytes_per_vector(faiss.downcast_index(index.index))
    if isinstance(index, faiss.IndexRefine):
        parts = map(faiss.downcast_index, (index.base_index, index.refine_index))
        return sum(map(_bytes_per_vector, parts))
    if isinstance(index, faiss.IndexIVF):
        return int(index.code_size) + 8
    if isinstance(index, faiss.IndexHNSW):  # a link takes 4 bytes, offset and level 12
        links = int(faiss.vector_to_array(index.hnsw.cum_nneighbor_per_level)[1])
        return _bytes_per_vector(faiss.downcast_index(index.storage)) + 4 * links + 12
    return int(index.code_size)


def create_exhaustive(dimension: int) -> FaissIndex:
    """Return an empty `Flat`."""
    return FaissIndex(faiss.IndexFlatL2(dimension))


def from_bytes(content: bytes) -> FaissIndex:
    """Return the index that `to_bytes` wrote. Raises ValueError if the content is damaged or of a newer FAISS."""
    try:
        return FaissIndex(faiss.deserialize_index(np.frombuffer(content, np.uint8)))
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[0][:200]) from None


def scan(
    queries_UD: NDArray[np.float32], vectors_ND: NDArray[np.float32], count: int
) -> tuple[NDArray[np.float32], IntArray]:
    """Return squared distances and numbers of the nearest vectors, from comparing the queries with all of them."""
    distances_UN, numbers_UN = faiss.knn(queries_UD, vectors_ND, count)
    return distances_UN, numbers_UN


def set_threads(threads: int) -> None:
    """Set the number of OpenMP threads of this process."""
    faiss.omp_set_num_threads(threads)


def _gpus() -> int:
    return int(faiss.get_num_gpus()) if hasattr(faiss, "index_cpu_to_all_gpus") else 0


def _reason(error: RuntimeError) -> str:
    """Return FAISS's message without the place in its source."""
    return re.sub(r"^Error in .* at \S+: (Error: )?", "", str(error).splitlines()[0])

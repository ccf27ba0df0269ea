"""Another search engine is one module: here NumPy takes the place of FAISS."""

import io
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray
from support.small_memory import assert_same_lists, build, by_global, by_local, states_near_rows, write_memory

from l2d_ray.index import faiss_engine
from l2d_ray.index.sharding import ShardedIndex


def scan(queries: NDArray, vectors: NDArray, count: int) -> tuple[NDArray, NDArray]:
    distances = np.square(queries[:, None] - vectors).sum(axis=2)
    numbers = np.argsort(distances, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(distances, numbers, axis=1), numbers


class NumpyIndex:
    """A search that compares a query with every vector."""

    exhaustive = True

    def __init__(self, vectors: NDArray[np.float32]) -> None:
        self._vectors = vectors
        self.dimension = vectors.shape[1]

    @property
    def count(self) -> int:
        return len(self._vectors)

    def training_rows(self) -> int:
        return 0

    def add(self, vectors: NDArray[np.float32]) -> None:
        self._vectors = np.vstack([self._vectors, vectors])

    def search(self, queries: NDArray[np.float32], count: int) -> tuple[NDArray, NDArray]:
        return scan(queries, self._vectors, count)

    def narrowest_search(self) -> str:
        return ""

    def set_search(self, setting: str) -> None:
        assert setting == ""

    def to_bytes(self) -> bytes:
        stream = io.BytesIO()
        np.save(stream, self._vectors)
        return stream.getvalue()


NUMPY = SimpleNamespace(
    NAME="NumPy",
    VERSION="2",
    default_factory=lambda rows, dimension: "scan",
    create=lambda factory, dimension: NumpyIndex(np.empty((0, dimension), np.float32)),
    create_exhaustive=lambda dimension: NumpyIndex(np.empty((0, dimension), np.float32)),
    from_bytes=lambda content: NumpyIndex(np.load(io.BytesIO(content))),
    scan=scan,
)


def users_of_the_engine() -> list[ModuleType]:
    return [module for module in sys.modules.values() if vars(module).get("engine") is faiss_engine]


def test_an_index_of_another_engine_recommends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, states = write_memory(tmp_path), states_near_rows()
    made, _ = build(workspace)
    expected = ShardedIndex.open(workspace, made.manifest)
    lists = by_global(expected, states, 20), by_local(expected, states, 20, 50)
    modules = users_of_the_engine()
    assert {module.__name__ for module in modules} >= {"l2d_ray.index.vector_search", "l2d_ray.stages.indexing"}
    for module in modules:
        monkeypatch.setattr(module, "engine", NUMPY)
    made, manifest = build(workspace)
    assert (manifest.factory, manifest.shards[0].segments[0].faiss_version) == ("scan", "2")
    index = ShardedIndex.open(workspace, made.manifest)
    assert isinstance(index.shards[0].segments[0].rows.candidates, NumpyIndex)
    assert_same_lists(by_global(index, states, 20), lists[0])
    assert_same_lists(by_local(index, states, 20, 50), lists[1])

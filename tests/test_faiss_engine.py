"""FAISS as the engine: default factory strings, and GPUs."""

from pathlib import Path
from typing import Any

import faiss
import pytest
from support.small_memory import build, write_memory

from l2d_ray.index import faiss_engine
from l2d_ray.index.faiss_engine import complete_factory, default_factory


def test_the_default_grows_with_the_shard() -> None:
    assert default_factory(1000, 576) == default_factory(faiss_engine.EXACT_BELOW_ROWS, 576) == "Flat"
    assert default_factory(1_000_000, 576) == "IVF4096,SQfp16"
    assert default_factory(60_000_000, 2048) == "IVF32768_HNSW32,PQ64"
    assert default_factory(60_000_000, 576) == "IVF32768_HNSW32,PQ64"


def test_a_factory_string_that_gives_its_sizes_is_complete() -> None:
    for factory in ("Flat", "SQfp16", "HNSW32", "IVF16,Flat", "OPQ4,IVF16,PQ4x4,RFlat"):
        assert complete_factory(factory, 1_000_000, 576) == factory
    assert complete_factory("IVF,PQ", 1_000_000, 100) == "IVF4096,PQ50"


def test_inverted_lists_found_on_gpus_give_the_same_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the means on the CPU stands for those on GPUs."""
    factories = ("IVF4,Flat", "IVF4,PQ4x4", "HNSW16")
    on_cpu = [build(write_memory(tmp_path / "cpu"), factory=name)[1] for name in factories]
    copies = []

    def to_all_gpus(index: Any) -> Any:
        copies.append(faiss.clone_index(index))
        return copies[-1]

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", to_all_gpus, raising=False)
    on_gpus = [build(write_memory(tmp_path / "gpus"), factory=name)[1] for name in factories]
    assert [copy.ntotal for copy in copies] == 2 * [4, 4, 4, 4]  # k-means, then the means of three shards
    for one, other in zip(on_cpu, on_gpus, strict=True):
        for shard, same in zip(one.shards, other.shards, strict=True):
            assert shard.segments[0].files["faiss"].sha256 == same.segments[0].files["faiss"].sha256

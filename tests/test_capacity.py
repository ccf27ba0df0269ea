from pathlib import Path

import numpy as np
import pytest
from support.small_workspace import config_of

from l2d_ray.bench.capacity import plan_capacity
from l2d_ray.config import Config
from l2d_ray.core.capacity import UPLOAD_PART, MemorySizes, Rates
from l2d_ray.data.dataset import Dataset
from l2d_ray.errors import InputError
from l2d_ray.index.engine import engine
from l2d_ray.schema import Split
from l2d_ray.stages.extraction import plan_units
from l2d_ray.workspace import Workspace

GIVEN = {
    "capacity.samples": 1_000_000_000,
    "capacity.items": 20_000_000,
    "capacity.dimension": 2048,
    "capacity.samples_per_second": 2_500,
    "capacity.scaling": 1.0,
    "capacity.start_seconds": 0,
    "capacity.dollars_per_worker_hour": 3,
    "memory.num_shards": 16,
    "workers.max": 10,
    "workers.gpus": 1,
    "workers.cpus": 8,
}


@pytest.fixture(scope="module")
def users() -> int:
    return 8


def test_the_duration_is_the_start_and_the_samples_over_the_rate_of_all_workers() -> None:
    rates = Rates(samples_per_second=50, start_seconds=10, scaling=0.8)
    assert rates.seconds(1000, 1) == pytest.approx(10 + 20)
    assert rates.seconds(1000, 4) == pytest.approx(10 + 1000 / 160)


@pytest.mark.parametrize(("samples_per_file", "requests"), [(1, 1), (5_000, 1), (6_000, 4), (11_000, 5)])
def test_large_files_are_uploaded_in_parts(samples_per_file: int, requests: int) -> None:
    sizes = MemorySizes(samples=samples_per_file * 8, units=4, shards=2, dimension=1000)
    assert sizes.data_requests == 8 * requests
    assert (sizes.bytes // 8 > UPLOAD_PART) == (requests > 1)


def test_a_billion_samples_are_planned_from_what_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_capacity(Config().replace(GIVEN | {"workspace": str(tmp_path)}))
    assert plan.build_hours == pytest.approx(1e9 / 2_500 / 10 / 3600, rel=1e-3)
    assert plan.compute_dollars == pytest.approx(1e9 / 2_500 / 3600 * 3, rel=1e-3)
    assert (plan.units, plan.data_files, plan.gpus, plan.cpus) == (10_000, 160_000, 10, 80)
    assert plan.memory_gigabytes == pytest.approx(4_100, rel=0.02)
    assert plan.factory.endswith("PQ64")
    assert plan.training_hours is None
    lines = capsys.readouterr().err.splitlines()
    assert {"input: samples = 1000000000", "input: dollars_per_worker_hour = 3.0"} <= {*lines}
    assert any(line.startswith("assumption: ") for line in lines)


def test_training_counts_every_epoch(tmp_path: Path) -> None:
    trained = {"capacity.training_samples_per_second": 100, "finetune.epochs": 2}
    plan = plan_capacity(Config().replace(GIVEN | trained | {"workspace": str(tmp_path)}))
    assert plan.training_hours == pytest.approx(2e9 / 100 / 10 / 3600, rel=1e-3)
    assert plan.compute_dollars == pytest.approx(10 * 3 * (plan.training_hours + plan.build_hours), rel=1e-3)


def test_what_is_not_given_is_read_from_the_workspace_and_measured(dataset: Path) -> None:
    config = config_of(dataset, **{"bench.samples": 50})
    opened = Dataset.open(Workspace.open(str(dataset)))
    plan = plan_capacity(config)
    assert plan.inputs["samples"] == opened.num_samples(Split.TRAIN)
    assert plan.inputs["items"] == len(opened.items())
    assert plan.inputs["dimension"] == 32
    assert plan.inputs["samples_per_second"] > 0
    assert plan.units == len(plan_units(config, opened))


def test_without_a_dataset_the_sizes_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run jobs/prepare_data\.py first"):
        plan_capacity(Config().replace({"workspace": str(tmp_path), "capacity.dimension": 8}))


@pytest.mark.parametrize(
    "factory",
    ["Flat", "SQfp16", "HNSW32", "IVF16,SQfp16", "IVF16_HNSW32,PQ16", "OPQ4,IVF16,PQ4", "IVF16,Flat,Refine(SQ8)"],
)
def test_the_bytes_of_a_vector_are_those_that_it_adds_to_an_index(factory: str) -> None:
    index = engine.create(factory, 32)
    vectors = np.random.default_rng(0).standard_normal((4000, 32), dtype=np.float32)
    index.train(vectors)
    index.add(vectors[:2000])
    before = len(index.to_bytes())
    index.add(vectors[2000:])
    assert engine.bytes_per_vector(factory, 32) == pytest.approx((len(index.to_bytes()) - before) / 2000, rel=0.03)

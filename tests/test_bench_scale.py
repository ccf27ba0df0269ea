"""The scale benchmark on a real S3 server: what it measures must be what jobs/plan_capacity.py plans."""

from pathlib import Path

import pytest
from support.s3_server import S3Server
from support.small_workspace import config_of

from l2d_ray.bench.scale import bench_scale
from l2d_ray.workspace import Workspace

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def users() -> int:
    return 20


def test_a_hundred_times_the_samples_take_no_more_driver_memory_and_few_requests(dataset: Path, s3: S3Server) -> None:
    uri = s3.uri("scale")
    Workspace.open(str(dataset)).copy("dataset", Workspace.open(uri), "dataset")
    result = bench_scale(config_of(dataset, **{"workspace": uri, "bench.samples": 100, "memory.units": 1}))
    assert [(run.scale, run.workers) for run in result.runs] == [(n, w) for n in (1, 10, 100) for w in (1, 2)]
    assert result.runs[-1].samples == 100 * result.runs[0].samples
    assert result.driver_growth < 1.15
    assert result.reads_per_unit is not None
    assert result.writes_per_unit is not None
    assert result.reads_per_unit + result.writes_per_unit <= 12
    for run in result.runs:
        assert run.data_bytes == pytest.approx(run.planned_bytes, rel=0.15)
        assert run.data_requests == 2 * run.units
    assert {path.partition("/")[0] for path in Workspace.open(uri).files("")} == {"dataset"}

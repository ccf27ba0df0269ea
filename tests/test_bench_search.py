import pytest

from l2d_ray.bench.search import bench_search
from l2d_ray.config import Config


@pytest.mark.slow
def test_the_search_benchmark_measures_every_index() -> None:
    bench = {"rows": [1000, 2000], "dimension": 16, "factories": ["Flat", "IVF,SQfp16"]}
    result = bench_search(Config.model_validate({"bench": bench}))
    measured = [(row["rows"], row["factory"], row["shards"]) for row in result.results]
    assert measured == [(r, f, s) for r in (1000, 2000) for f in ("Flat", "IVF,SQfp16") for s in (1, 4)]
    for row in result.results:
        assert row["recall_top_k"] >= 0.995
        assert row["local_ms"] > 0
    assert result.results[0]["bytes_per_row"] == pytest.approx(4 * 16 + 2 * 16 + 12, rel=0.02)
    assert [row["rows"] for row in result.extrapolated] == [10**9] * 2
    (flat, lists), (own_flat, _, own_lists, _) = result.extrapolated, result.results[4:]
    assert flat["local_ms"] == pytest.approx(own_flat["local_ms"] * 1e9 / 2000, rel=0.01)
    assert lists["local_ms"] == pytest.approx(own_lists["local_ms"] * (1e9 / 2000) ** 0.5, rel=0.01)

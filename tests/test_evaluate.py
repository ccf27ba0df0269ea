"""The evaluation on Ray, of a recommender that this test adds."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support import evaluations
from support.small_endpoint import write_endpoint
from support.small_workspace import config_of, write_dataset

from l2d_ray.distributed.evaluate import evaluate
from l2d_ray.recommenders.contract import IndexKey
from l2d_ray.recommenders.registry import MODULES
from l2d_ray.stages.evaluation import plan_evaluation
from l2d_ray.stages.index_plan import plan_index

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_new_recommender_is_evaluated_on_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ray_session: None
) -> None:
    """A module and a line in the list are enough; the workers import the module by its name."""
    monkeypatch.setitem(MODULES, "toy", "support.toy_recommender")
    write_dataset(tmp_path, users=60)
    result = evaluate(config_of(tmp_path, **{"evaluate.recommenders": '["toy","most-popular","toy-1"]'}))
    names = ["toy", "most-popular", "toy-1"]
    assert [row["recommender"] for row in result.results] == names
    assert (result.top_m, result.prior) == (None, None)
    assert all(name in capsys.readouterr().out for name in names[:1])
    report = json.loads((tmp_path / "reports/evaluation.json").read_text())
    assert report["validation"]["chosen"].keys() == {"toy"}
    assert [row["parity"] for row in report["validation"]["results"]] == [0, 1]
    ranks = pq.read_table(tmp_path / "reports/evaluation.parquet")
    assert ranks.column_names == ["run", "recommender", "sample_id", "user_hash", "target", "rank"]
    assert len(ranks) == 3 * 60


def test_a_fresh_memory_is_evaluated_on_ray_as_in_one_process(tmp_path: Path, ray_session: None) -> None:
    """The job computes the rows of validation and test samples first."""
    settings = {
        "evaluate.memory": "fresh",
        "evaluate.recommenders": '["most-popular","l2d-global"]',
        "evaluate.fractions": [],
        "evaluate.top_m": [20],
        "evaluate.priors": [2.0],
        "evaluate.batch_size": 16,
    }
    config = write_endpoint(tmp_path, daily=True, **settings)
    result = evaluate(config)
    index = {IndexKey(config.index.space): plan_index(config).manifest}
    expected = evaluations.evaluate(plan_evaluation(config), index)
    found = [row["recall@20"] for row in result.results]
    assert found == [row.metrics.means["recall@20"] for row in expected.results]

"""The evaluation on Ray, of a recommender that this test adds."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.small_workspace import config_of, write_dataset

from l2d_ray.distributed.evaluate import evaluate
from l2d_ray.recommenders.registry import MODULES

pytestmark = pytest.mark.ray


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

"""The comparison on Ray, from raw tables to the report, with a tiny model."""

import json
import re
from pathlib import Path

import pytest
from support.run_all_jobs import write_raw_files
from support.small_training import train_in_this_process
from support.tiny_models import save_tiny

from l2d_ray.command_line import load_config
from l2d_ray.distributed.compare import compare

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SETTINGS = [
    "finetune.epochs=1",
    "finetune.batch_size=16",
    "finetune.micro_batch_size=8",
    "finetune.valid_samples=12",
    "memory.units=2",
    "memory.num_shards=2",
    "train.epochs=2",
    "train.length=6",
    "train.dimension=8",
    "train.dropout=0",
    "train.weight_decay=0",
    "train.loss=softmax",
    "compare.tune=true",
    "evaluate.recommenders=[l2d-global,transitions,sasrec]",
    "evaluate.fractions=[]",
    "workers.max=1",
]


def test_one_command_leads_from_raw_tables_to_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run trains and builds nothing again, and finds the same."""
    train_in_this_process(monkeypatch)
    workspace, model = tmp_path / "workspace", save_tiny(tmp_path / "model")
    config = load_config([f"workspace={workspace}", f"model.name={model}", *write_raw_files(tmp_path), *SETTINGS])
    result = compare(config)
    names = ["l2d-global", "transitions", "sasrec", "sasrec-seed1"]
    assert list(result.recall_at_20) == names
    assert [ratio["recommender"] for ratio in result.ratios] == names[1:]
    printed = capsys.readouterr()
    assert re.findall(r"^\[\d/6\] (\w+)", printed.err, re.MULTILINE) == [
        *("prepare_data", "finetune", "build_memory", "build_index", "train", "evaluate")
    ]
    assert all(name in printed.out for name in names)
    report = json.loads(Path(result.report).read_text())
    searched = {one["recommender"]: one["configurations"] for one in report["allowed"]}
    assert searched == {"l2d-global": 1, "transitions": 1, "sasrec": 2, "sasrec-seed1": 2}
    tables = Path(result.tables).read_text()
    assert "## Seeds" in tables
    assert Path(result.figure).name in tables
    assert Path(result.figure).read_bytes().startswith(b"\x89PNG")
    built = {path: path.stat().st_mtime_ns for path in workspace.rglob("*") if path.parts[-2] in ("sasrec", "adapter")}
    units = {path: path.stat().st_mtime_ns for path in (workspace / "memory/units").iterdir()}
    again = compare(config)
    assert again.recall_at_20 == result.recall_at_20
    assert again.ratios == result.ratios
    assert all(path.stat().st_mtime_ns == time for path, time in (built | units).items())

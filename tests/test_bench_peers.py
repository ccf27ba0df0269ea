"""Packed extraction next to an engine in another process."""

import sys
from pathlib import Path

import pytest
from support.small_workspace import config_of, write_dataset

from l2d_ray.bench.peers import bench_peers
from l2d_ray.errors import InputError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_an_engine_runs_the_same_prompts_and_finds_the_same_states(tmp_path: Path) -> None:
    write_dataset(tmp_path, users=6)
    config = config_of(tmp_path, **{"bench.samples": 20, "bench.repeats": 2, "bench.threads": 1}).replace(
        {"bench.peers": {"transformers": sys.executable}}
    )
    result = bench_peers(config)
    (peer,) = result.peers
    assert peer.name == "transformers"
    assert peer.relative_error < 1e-4
    assert peer.prompts_per_second > 0
    assert peer.packed_over_it > 0
    assert result.prompts == 20
    assert result.distinct_tokens < result.tokens


@pytest.mark.parametrize(
    ("peers", "message"),
    [
        (
            {"nobody": sys.executable},
            r"^bench.peers: jobs/peers/nobody_states.py does not exist; choose from trans",
        ),
        (
            {"transformers": "/nowhere/python"},
            r"^bench.peers: /nowhere/python: No such file.*; give the engine's Python$",
        ),
        ({"transformers": "/bin/false"}, r"^bench.peers: transformers ended with status 1; .+ says why$"),
    ],
)
def test_what_cannot_run_is_refused_by_name(tmp_path: Path, peers: dict[str, str], message: str) -> None:
    write_dataset(tmp_path, users=6)
    with pytest.raises(InputError, match=message):
        bench_peers(config_of(tmp_path, **{"bench.samples": 5}).replace({"bench.peers": peers}))

"""Sizes of pools, and what a job asks a cluster for."""

import pytest

from l2d_ray.config import Config, FinetuneConfig, WorkersConfig
from l2d_ray.distributed import workers
from l2d_ray.distributed.demand import gather
from l2d_ray.errors import InputError


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Pretend to be on a cluster that may grow, with room for this number of workers."""
    monkeypatch.setattr(workers, "_may_grow", lambda: True)
    monkeypatch.setattr(workers, "_room", lambda _: request.param)
    monkeypatch.setattr(workers, "_lack", lambda *_: "they do not fit")


@pytest.mark.parametrize(
    ("selector", "matches"),
    [
        ({}, True),
        ({"zone": "a"}, True),
        ({"zone": "b"}, False),
        ({"zone": "!b"}, True),
        ({"zone": "in(a,b)"}, True),
        ({"zone": "in(b, c)"}, False),
        ({"zone": "!in(a, b)"}, False),
        ({"rack": "1"}, False),
        ({"rack": "!1"}, True),
        ({"zone": "a", "ray.io/market-type": "spot"}, True),
        ({"zone": "a", "ray.io/market-type": "on-demand"}, False),
    ],
)
def test_labels_select_nodes(selector: dict[str, str], matches: bool) -> None:
    labels = {"zone": "a", "ray.io/market-type": "spot"}
    assert workers.has_labels(labels, WorkersConfig(labels=selector).labels) == matches


@pytest.mark.parametrize("selector", ["a b", "in()", "in(a", "!!a", "", "-a"])
def test_a_selector_that_ray_would_refuse_is_refused(selector: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        WorkersConfig(labels={"zone": selector})


@pytest.mark.ray
@pytest.mark.parametrize("cluster", [4], indirect=True)
def test_a_pool_on_a_cluster_asks_for_more_than_fit(cluster: None, ray_session: None) -> None:
    """A head with CPUs is no limit."""
    every = workers.actor_pool(Config(), 40)
    assert (every.min_size, every.initial_size, every.max_size) == (40, 40, 40)
    ahead = workers.actor_pool(Config(), 10_000)
    assert (ahead.min_size, ahead.max_size) == (workers.ASK_AHEAD, 10_000)
    some = workers.actor_pool(Config(workers=WorkersConfig(max=6)), 40)
    assert (some.min_size, some.max_size) == (6, 6)


@pytest.mark.parametrize(
    ("cluster", "settings", "asked"),
    [
        (0, {}, (2, 1)),  # batches of 128 samples hold two micro-batches of 64
        (4, {}, None),
        (4, {"max": 8}, (8, 1)),
        (4, {"max": 8, "min": 6}, (8, 6)),
        (8, {"max": 8}, None),
        (0, {"max": 100}, (50, 1)),  # more workers than samples
    ],
    indirect=["cluster"],
)
def test_training_asks_for_workers_and_starts_with_those_that_are_found(
    cluster: None,
    settings: dict[str, int],
    asked: tuple[int, int] | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = []

    def found(config: WorkersConfig, wanted: int, at_least: int, seconds: float) -> int:
        calls.append((wanted, at_least))
        assert seconds == config.wait_seconds == 30
        return at_least

    monkeypatch.setattr(workers, "gather", found)
    config = Config(workers=WorkersConfig(wait_seconds=30, **settings), finetune=FinetuneConfig())
    number = workers.training_workers(config, 50)
    if asked is None:
        assert (calls, number) == ([], settings.get("max", 4))
    else:
        assert (calls, number) == ([asked], asked[1])
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == "they do not fit: waiting up to workers.wait_seconds=30 for more"
        assert lines[1].startswith(f"training starts with {number} of {asked[0]} workers, ")


@pytest.mark.ray
def test_what_has_room_is_found_and_given_back(ray_session: None) -> None:
    """The Ray of the tests has 4 CPUs."""
    assert gather(WorkersConfig(), 5) == 4
    assert gather(WorkersConfig(), 4) == 4


@pytest.mark.ray
def test_a_worker_that_the_autoscaler_refuses_is_an_error(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from l2d_ray.distributed import demand

    refusals = iter([False, True, False, True, True, True])  # Ray may refuse for a moment

    class Everything(str):
        def __contains__(self, _: object) -> bool:
            return next(refusals)

    monkeypatch.setattr(demand, "PATIENCE", 1.5)
    monkeypatch.setattr(demand, "infeasible_groups", Everything)
    with pytest.raises(InputError, match=r"workers.gpus=1, workers.labels=.*: the cluster's autoscaler can start no"):
        gather(WorkersConfig(gpus=1, labels={"zone": "a"}), 1)
    assert not list(refusals)

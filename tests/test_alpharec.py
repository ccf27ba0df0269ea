"""AlphaRec against its formulas on dense matrices, what it learns, and the folder that its training leaves."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.sequences import config_of, loaded, trained, write_sequences
from support.tiny_models import save_tiny
from torch.nn import functional

from l2d_ray.config import Config, TrainConfig
from l2d_ray.core.query import Query
from l2d_ray.errors import InputError
from l2d_ray.recommenders.alpharec import AlphaRecLearner, Graph, Network, sample_losses, standardised
from l2d_ray.recommenders.most_popular import MostPopular
from l2d_ray.recommenders.training import TrainingData
from l2d_ray.stages.tuning import plan_trials

ITEMS = 12
QUICK = {"dimension": 8, "epochs": 3, "learning_rate": 1e-2, "negatives": 8, "batch_size": 16}
"""Settings of a training that takes a second."""
LAYERS = (1, 2, 3)


def random_data(users: int = 9, num_items: int = ITEMS, seed: int = 0) -> TrainingData:
    """Return sequences of 2 to 7 items, some twice; the last item has no user."""
    random = np.random.default_rng(seed)
    lengths = random.integers(2, 8, users)
    items = random.integers(0, num_items - 1, lengths.sum()).astype(np.int32)
    return TrainingData(items, np.cumsum([0, *lengths]), num_items)


def states(num_items: int = ITEMS, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(3, 2, (num_items, 6)).astype(np.float32)


def learner_of(data: TrainingData, **settings: Any) -> AlphaRecLearner:
    return AlphaRecLearner(states(data.num_items), TrainConfig(**QUICK | settings), data, "cpu")


def histories_of(data: TrainingData) -> list[list[int]]:
    return [part.tolist() for part in np.split(data.items, data.offsets[1:-1])]


def expected_vectors(data: TrainingData, network: Network, titles: torch.Tensor, layers: int) -> torch.Tensor:
    """Return e of users and items, by the module's docstring, on the dense adjacency matrix of all nodes."""
    histories = [sorted(set(history)) for history in histories_of(data)]
    users = len(histories)
    edges = torch.zeros(users + data.num_items, users + data.num_items)
    for user, history in enumerate(histories):
        for item in history:
            edges[user, users + item] = edges[users + item, user] = 1
    degrees = edges.sum(dim=1).clamp(min=1)
    z = torch.cat([torch.stack([titles[history].mean(dim=0) for history in histories]), titles])
    e = network.outer(functional.leaky_relu(network.inner(z)))
    total = e
    for _ in range(layers):
        e = (edges / degrees.sqrt()[:, None] / degrees.sqrt()) @ e
        total = total + e
    return total


@pytest.mark.parametrize("layers", LAYERS)
def test_vectors_are_those_of_the_formulas(layers: int) -> None:
    data, titles = random_data(), torch.from_numpy(standardised(states()))
    torch.manual_seed(0)
    network = Network(TrainConfig(dimension=8, blocks=layers), 6)
    users, items = network(titles, Graph.of(data, torch.device("cpu")))
    assert len(items) == layers + 1
    found = torch.cat([users, torch.stack(items).sum(dim=0)])
    torch.testing.assert_close(found, expected_vectors(data, network, titles, layers))


@pytest.mark.parametrize("layers", LAYERS)
def test_a_training_user_keeps_its_vector_as_a_query(layers: int) -> None:
    data = random_data()
    learner = learner_of(data, blocks=layers)
    learner.run_epoch(1)
    expected, _ = learner._model(learner._titles_IE, learner._graph)
    histories = [sorted(set(history)) for history in histories_of(data)]
    items = torch.tensor([item for history in histories for item in history])
    found = learner.recommender().users(items, torch.tensor([len(history) for history in histories]))
    torch.testing.assert_close(found, functional.normalize(expected))


def test_a_loss_is_that_of_the_definition() -> None:
    random = np.random.default_rng(0)
    positives, negatives, rows = random.normal(size=5), random.normal(size=(3, 4)), [0, 0, 1, 2, 2]
    own = random.random((3, 4)) < 0.4
    found = sample_losses(
        torch.tensor(positives), torch.tensor(rows), torch.tensor(negatives), torch.tensor(own), temperature=0.2
    )
    for loss, positive, row in zip(found.tolist(), positives, rows, strict=True):
        against = np.exp(negatives[row][~own[row]] / 0.2).sum()
        assert loss == pytest.approx(-np.log(np.exp(positive / 0.2) / (np.exp(positive / 0.2) + against)))


def test_a_user_who_has_every_item_gives_no_loss_and_a_finite_gradient() -> None:
    positives, negatives = torch.ones(1, requires_grad=True), torch.ones(1, 3, requires_grad=True)
    own = torch.ones(1, 3, dtype=torch.bool)
    loss = sample_losses(positives, torch.tensor([0]), negatives, own, temperature=0.15).sum()
    torch.autograd.backward(loss)
    assert loss.item() == 0
    assert positives.grad is not None
    assert negatives.grad is not None
    assert torch.isfinite(torch.cat([positives.grad, negatives.grad[0]])).all()


def test_an_epoch_has_every_training_sample_once() -> None:
    data = random_data(users=20)
    learner = learner_of(data)
    order = np.random.default_rng(1).permutation(20)
    rows, targets = learner._samples_of(order)
    found = sorted(zip(order[rows].tolist(), targets.tolist(), strict=True))
    expected = [(user, item) for user, history in enumerate(histories_of(data)) for item in history[1:]]
    assert found == sorted(expected)
    assert len(found) == data.samples
    assert sum(len(losses) for losses in learner._losses(1)) == data.samples


def test_users_of_two_tastes_get_items_of_their_taste_also_a_new_one() -> None:
    """Even and odd items have different titles, and a user has items of one kind. No user has the last two items."""
    random, num_items = np.random.default_rng(0), 20
    histories = [random.permutation(9)[:5] * 2 + user % 2 for user in range(60)]
    data = TrainingData(np.concatenate(histories).astype(np.int32), np.arange(61) * 5, num_items)
    kinds = np.where(np.arange(num_items)[:, None] % 2, 1.0, -1.0)
    titles = (random.normal(size=(num_items, 6)) + 2 * kinds).astype(np.float32)
    learner = AlphaRecLearner(titles, TrainConfig(**QUICK), data, "cpu")
    losses = [learner.run_epoch(epoch) for epoch in range(1, 16)]
    assert losses[-1] < losses[0]
    for kind in (0, 1):
        (found,) = learner.recommender().recommend([Query.after([kind, kind + 4, kind + 8], 7)])
        assert (found.items_I % 2 == kind).all()
        assert 18 + kind in found.items_I


def test_order_and_repetition_of_a_history_do_not_count_but_its_length_may() -> None:
    data = random_data()
    whole, last = (learner_of(data, length=length).recommender() for length in (100, 2))
    queries = [Query(history, 5) for history in ([3, 1, 4], [1, 1, 3, 4, 3], [9, 1, 4], [4, 1])]
    first, shuffled, *_ = whole.scores([query.history for query in queries])
    np.testing.assert_allclose(first, shuffled, rtol=1e-5)
    one, _, other, reverse = last.scores([query.history for query in queries])
    np.testing.assert_allclose(one, other, rtol=1e-5)
    np.testing.assert_allclose(one, reverse, rtol=1e-5)
    assert not np.allclose(first, one)


def test_a_history_without_a_known_item_gets_popular_items() -> None:
    data = random_data()
    recommender = learner_of(data).recommender()
    unknown, beyond = recommender.recommend([Query(["New"], 5), Query([ITEMS, -1], 5)])
    (popular,) = MostPopular.fit(data.items).recommend([Query([0], 5)])
    assert unknown.items_I.tolist() == beyond.items_I.tolist() == popular.items_I.tolist()
    mixed, known = recommender.scores([[3, "New", 4], [3, 4]])
    np.testing.assert_allclose(mixed, known, rtol=1e-5)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Write two models."""
    return [save_tiny(tmp_path_factory.mktemp("model"), seed=seed) for seed in (0, 1)]


HISTORIES = np.random.default_rng(0).integers(0, ITEMS, (20, 8)).tolist()


def prepared(folder: Path, model: str, recommender: str = "alpharec", **settings: Any) -> Config:
    """Write a dataset, if there is none, and return the configuration of a training."""
    if not (folder / "dataset").exists():
        write_sequences(folder, HISTORIES, ITEMS)
    return config_of(folder, recommender, **QUICK | settings).replace({"model.name": model})


class Killed(Exception):
    pass


def kill(history: Any) -> None:
    if len(history) == 2:
        raise Killed


def test_a_training_that_was_killed_ends_with_the_same_weights(tmp_path: Path, models: list[str]) -> None:
    config = prepared(tmp_path / "killed", models[0])
    with pytest.raises(Killed):
        trained(config, kill)
    (titles,) = (tmp_path / "killed/recommenders/titles").glob("*.safetensors")
    written = titles.stat().st_mtime_ns
    resumed, whole = trained(config), trained(prepared(tmp_path / "whole", models[0]))
    assert resumed.sha256 == whole.sha256
    assert [(epoch.loss, epoch.ndcg) for epoch in resumed.history] == [(one.loss, one.ndcg) for one in whole.history]
    assert titles.stat().st_mtime_ns == written


def test_a_loaded_recommender_is_the_one_that_was_trained_and_needs_no_model(tmp_path: Path, models: list[str]) -> None:
    model = shutil.copytree(models[0], tmp_path / "model")
    config = prepared(tmp_path / "ws", str(model), length=5)
    record = trained(config)
    (titles,) = (tmp_path / "ws/recommenders/titles").glob("*.safetensors")
    from safetensors.torch import load_file

    data = TrainingData(np.array(HISTORIES, np.int32)[:, :-2].ravel(), np.arange(21) * 6, ITEMS)
    learner = AlphaRecLearner(load_file(titles)["states_ID"].numpy(), record.train, data, "cpu")
    for epoch in record.history[: record.best_epoch]:
        assert learner.run_epoch(epoch.epoch) == epoch.loss
    shutil.rmtree(model)
    queries = [[0], [3, 4, 5], [*range(9)]]
    found = loaded(config)
    np.testing.assert_array_equal(found.scores(queries), learner.recommender().scores(queries))
    assert found.length == 5


def refused(config: Config) -> str:
    with pytest.raises(InputError) as caught:
        trained(config)
    return str(caught.value).replace(config.workspace, "WS")


def test_another_model_needs_another_training_and_two_of_one_model_share_the_titles(
    tmp_path: Path, models: list[str]
) -> None:
    first = trained(prepared(tmp_path, models[0]))
    message = refused(prepared(tmp_path, models[1]))
    assert "recommenders/alpharec/training.json: belongs to another training: titles.base_model ('" in message
    assert message.endswith("; set recommender=alpharec-2 to keep both, or delete its folder")
    second = trained(prepared(tmp_path, models[0], "alpharec-2", seed=1))
    assert second.sha256 != first.sha256
    assert len([*(tmp_path / "recommenders/titles").iterdir()]) == 1
    assert trained(prepared(tmp_path, models[1], "alpharec-3")).sha256 != first.sha256
    assert len([*(tmp_path / "recommenders/titles").iterdir()]) == 2


def test_what_cannot_work_is_refused_in_a_line(tmp_path: Path, models: list[str]) -> None:
    assert refused(prepared(tmp_path, models[0], learning_rate=1e30)) == (
        "train.learning_rate=1e+30: the loss is not finite in epoch 1; lower it"
    )
    assert refused(prepared(tmp_path, models[0], heads=2)) == "train.heads=2: alpharec has no use for it; leave it out"
    assert "no-model" in refused(prepared(tmp_path, f"{tmp_path}/no-model"))
    (titles,) = (tmp_path / "recommenders/titles").glob("*.safetensors")
    titles.write_bytes(titles.read_bytes()[:50])
    message = refused(prepared(tmp_path, models[0]))
    assert message.startswith(f"WS/recommenders/titles/{titles.name}: damaged (")
    assert message.endswith("); delete it and run the same command again")
    write_sequences(tmp_path, [[0, 1, 2]], 3)
    assert refused(prepared(tmp_path, models[0])) == "WS/dataset: has 0 training samples; prepare more data"
    write_sequences(tmp_path, [[0, 0, 0, 0]], 1)
    assert "has 1 item, so that there is nothing to rank" in refused(prepared(tmp_path, models[0]))


def test_weights_of_another_recommender_are_refused(tmp_path: Path, models: list[str]) -> None:
    config = prepared(tmp_path, models[0])
    trained(config_of(tmp_path, "sasrec", epochs=1, dimension=8))
    shutil.copytree(tmp_path / "recommenders/sasrec", tmp_path / "recommenders/alpharec")
    with pytest.raises(InputError, match=r"holds other weights than training.json says; delete its folder and run"):
        loaded(config)


def test_the_grid_has_as_many_choices_as_a_search_tries(tmp_path: Path, models: list[str]) -> None:
    config = config_of(tmp_path, "alpharec").replace({"model.name": models[0]})
    write_sequences(tmp_path, HISTORIES, ITEMS)
    trials = plan_trials(config)
    assert len({trial.name for trial in trials}) == config.tune.trials == 24
    assert {trial.values["temperature"] for trial in trials} == {0.15, 0.2}

"""Neural models of sequences: what they learn, what they read, and the recommender that a training leaves."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.sequences import config_of, cycles, loaded, trained, write_sequences

from l2d_ray.config import TrainConfig
from l2d_ray.core.query import Query
from l2d_ray.recommenders.esasrec import ESASRec
from l2d_ray.recommenders.gru4rec import GRU4Rec
from l2d_ray.recommenders.most_popular import MostPopular
from l2d_ray.recommenders.sasrec import SASRec
from l2d_ray.recommenders.sequential import SequenceModel
from l2d_ray.recommenders.sequential_training import SequenceLearner, Windows
from l2d_ray.recommenders.training import TrainingData
from l2d_ray.schema import Split

ITEMS = 12
MODELS = {"sasrec": SASRec, "esasrec": ESASRec, "gru4rec": GRU4Rec}
QUICK = {"dimension": 16, "length": 6, "epochs": 4, "learning_rate": 1e-2}
"""Settings of a training that takes a second."""

every_name = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a workspace of cycles."""
    write_sequences(tmp_path, cycles(40, 11, ITEMS), ITEMS)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "loss"),
    [("sasrec", "softmax"), ("sasrec", "sampled-softmax"), ("sasrec", "binary"), ("esasrec", None), ("gru4rec", None)],
)
def test_the_next_item_of_a_cycle_is_found(folder: Path, name: str, loss: str | None) -> None:
    settings = QUICK | {"epochs": 40, "batch_size": 16, "dropout": 0, "negatives": 8} | ({"loss": loss} if loss else {})
    config = config_of(folder, name, **settings)
    record = trained(config)
    assert record.history[record.best_epoch - 1].ndcg > 0.99
    queries = [Query.after([(item + step) % ITEMS for step in range(9)], 1) for item in range(ITEMS)]
    found = [int(one.items_I[0]) for one in loaded(config).recommend(queries)]
    assert found == [(item + 9) % ITEMS for item in range(ITEMS)]


@every_name
def test_a_loaded_recommender_is_the_one_that_was_trained(folder: Path, name: str) -> None:
    config, kept = config_of(folder, name, **QUICK, patience=4), {}
    data = TrainingData.read(write_sequences(folder, cycles(40, 11, ITEMS), ITEMS))
    record = trained(config)
    learner = SequenceLearner(MODELS[name], record.train, data, "cpu")
    queries = [Query.after(history, 5) for history in ([0], [3, 4, 5], [*range(9)])]
    for epoch in record.history:
        assert learner.run_epoch(epoch.epoch) == epoch.loss
        kept[epoch.epoch] = learner.recommender().recommend(queries)
    for found, expected in zip(loaded(config).recommend(queries), kept[record.best_epoch], strict=True):
        np.testing.assert_array_equal(found.items_I, expected.items_I)
        np.testing.assert_array_equal(found.scores_I, expected.scores_I)


@every_name
def test_the_parts_of_a_batch_give_the_losses_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    offsets = np.cumsum([0, *random.integers(2, 14, 60)])
    data = TrainingData(random.integers(0, ITEMS, offsets[-1]).astype(np.int32), offsets, ITEMS)
    settings = TrainConfig(**QUICK | {"length": 12, "dropout": 0, "loss": "softmax"})

    def losses() -> list[list[float]]:
        learner = SequenceLearner(MODELS[name], settings, data, "cpu")
        return [sorted(losses_N.tolist()) for losses_N in learner._losses(1)]

    in_parts, parts = losses(), list[int]()
    with monkeypatch.context() as patch:
        patch.setattr(SequenceLearner, "_parts", lambda _, __, rows: parts.append(len(rows)) or [rows])
        np.testing.assert_allclose(np.concatenate(in_parts), np.concatenate(losses()), rtol=1e-4)
    assert sum(parts) >= offsets.size - 1


@given(st.lists(st.integers(2, 30), min_size=1, max_size=9), st.integers(1, 12))
def test_every_training_sample_is_in_one_window(sizes: list[int], length: int) -> None:
    """Items are numbered, so that the target of item i is item i + 1."""
    offsets = np.cumsum([0, *sizes])
    data = TrainingData(np.arange(sum(sizes), dtype=np.int32), offsets, sum(sizes))
    windows = Windows.cut(data, length, np.random.default_rng(0))
    items, targets, lengths = windows.batch(np.arange(windows.starts.size))
    assert lengths.max() <= length
    filled = items == data.num_items
    assert (filled.sum(axis=1) == items.shape[1] - lengths).all()
    np.testing.assert_array_equal(filled, targets == data.num_items)
    np.testing.assert_array_equal(targets[~filled], items[~filled] + 1)
    expected = [item for start, stop in pairwise(offsets) for item in range(start + 1, stop)]
    assert sorted(targets[~filled].tolist()) == expected
    assert data.samples == len(expected)
    assert windows.starts.size >= sum(-(-(size - 1) // length) for size in sizes)
    whole = [start for start, size in zip(offsets, sizes, strict=False) if size - 1 <= length]
    assert set(whole) <= set(windows.starts.tolist())


def test_nothing_after_the_last_training_sample_is_trained_on(tmp_path: Path) -> None:
    histories = [[0, 1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 3], [9, 8]]
    dataset = write_sequences(tmp_path, histories[:3], 10)
    data = TrainingData.read(dataset)
    assert data.items.tolist() == [0, 1, 2, 5, 6]
    assert data.offsets.tolist() == [0, 3, 5]
    assert data.samples == dataset.num_samples(Split.TRAIN) == 3


@pytest.mark.parametrize("build", MODELS.values())
def test_a_place_reads_no_later_one_and_no_filling(build: type[SequenceModel]) -> None:
    settings = TrainConfig(dimension=16, length=8)
    torch.manual_seed(0)
    model = build(settings, ITEMS)
    model.initialise()
    model.eval()
    items = torch.tensor([[3, 1, 4, 1, 5]])
    states = model(items, torch.tensor([5]))
    changed = model(torch.tensor([[3, 1, 4, 9, 2]]), torch.tensor([5]))
    torch.testing.assert_close(states[:, :3], changed[:, :3])
    assert not torch.allclose(states[:, 3:], changed[:, 3:])
    filled = torch.cat([items, torch.full((1, 3), ITEMS)], dim=1)
    torch.testing.assert_close(model(filled, torch.tensor([5]))[:, :5], states)


@every_name
def test_a_history_without_a_known_item_gets_popular_items(tmp_path: Path, name: str) -> None:
    random = np.random.default_rng(0)
    dataset = write_sequences(tmp_path, random.integers(0, ITEMS, (9, 8)).tolist(), ITEMS)
    config, data = config_of(tmp_path, name, **QUICK), TrainingData.read(dataset)
    trained(config)
    recommender = loaded(config)
    unknown, beyond, mixed, known = recommender.recommend(
        [Query(["New"], 5), Query([ITEMS, 99], 5), Query([3, "New", 4], 5), Query([3, 4], 5)]
    )
    (popular,) = MostPopular.fit(data.items).recommend([Query([0], 5)])
    assert unknown.items_I.tolist() == beyond.items_I.tolist() == popular.items_I.tolist()
    assert mixed.items_I.tolist() == known.items_I.tolist()
    np.testing.assert_allclose(mixed.scores_I, known.scores_I, rtol=1e-5)


def test_only_the_last_items_of_a_history_count(folder: Path) -> None:
    trained(config := config_of(folder, **QUICK))
    long, short = loaded(config).recommend([Query([9, 9, *range(6)], 5), Query([*range(6)], 5)])
    assert long.items_I.tolist() == short.items_I.tolist()
    np.testing.assert_allclose(long.scores_I, short.scores_I, rtol=1e-5)

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.small_workspace import ITEM_COUNT, config_of, expected_ids, write_dataset
from support.tiny_models import tiny_tokenizer

from l2d_ray.config import Config
from l2d_ray.data.samples import iter_samples
from l2d_ray.errors import InputError
from l2d_ray.prompts import PromptEncoder
from l2d_ray.schema import Split
from l2d_ray.stages.finetuning import (
    Progress,
    SamplePhraser,
    SampleTable,
    Schedule,
    learning_rate_factor,
    run_digest,
)

TITLES = [f"Title {i} of the year" for i in range(ITEM_COUNT)]


def table(users: int = 5, length: int = 9) -> SampleTable:
    """Return a table of `users` histories, all of whose positions are samples. Windows start anew after four items."""
    positions = np.tile(np.arange(1, length), users)
    first = np.repeat(np.arange(users) * length, length - 1)
    items = np.random.default_rng(0).integers(0, ITEM_COUNT, users * length).astype(np.int32)
    return SampleTable(items, first + (positions - 1) // 4 * 4, first + positions, np.arange(positions.size))


def phraser(context_length: int = 10_000) -> SamplePhraser:
    return SamplePhraser(PromptEncoder(Config().prompt, tiny_tokenizer(), TITLES), context_length)


@given(
    users=st.integers(1, 9),
    workers=st.integers(1, 4),
    batch_size=st.integers(1, 70),
    micro=st.integers(1, 20),
)
def test_every_sample_is_in_one_micro_batch_an_epoch(users: int, workers: int, batch_size: int, micro: int) -> None:
    samples = table(users)
    schedule = Schedule(len(samples), 2, workers, batch_size, micro)
    steps = list(schedule.divide(samples, seed=0))
    assert len(steps) == schedule.steps
    for epoch in (0, 1):
        of_epoch = steps[epoch * schedule.steps_per_epoch :][: schedule.steps_per_epoch]
        rows = np.concatenate([part for step in of_epoch for worker in step for part in worker])
        assert sorted(rows) == list(range(len(samples)))
    for step in steps:
        assert [len(worker) for worker in step] == [schedule.micro_batches] * workers
        sizes = [part.size for worker in step for part in worker]
        assert min(sizes) >= 1
        assert sum(sizes) <= 5 / 3 * max(batch_size, 2 * workers - 1) + 1
        assert max(sizes) <= 5 / 3 * max(micro, 2) + 1


@given(windows=st.lists(st.integers(1, 30), min_size=1, max_size=20), parts=st.integers(1, 12))
def test_parts_are_of_similar_size_and_end_where_a_window_ends_near(windows: list[int], parts: int) -> None:
    starts = np.repeat(np.arange(len(windows)), windows)
    assume(starts.size >= parts)
    samples = SampleTable(starts.astype(np.int32), starts, np.arange(starts.size), np.arange(starts.size))
    found = samples.split(np.arange(starts.size), parts)
    assert np.concatenate(found).tolist() == list(range(starts.size))
    assert len(found) == parts
    assert min(part.size for part in found) >= 1
    size, ends = starts.size / parts, np.cumsum(windows)
    assert max(part.size for part in found) <= 5 / 3 * size + 1
    for number, cut in enumerate(np.cumsum([part.size for part in found])[:-1], start=1):
        even = round(number * size)
        assert cut == even or cut in ends
        if abs(ends - even).min() <= int(size) // 3:
            assert cut in ends


def test_the_workers_of_a_step_run_about_as_many_titles() -> None:
    windows = np.random.default_rng(0).integers(1, 41, 400)
    starts = np.repeat(np.cumsum(windows) - windows, windows)
    samples = SampleTable(np.zeros(starts.size, np.int32), starts, np.arange(starts.size) + 5, np.arange(starts.size))
    titles = [
        [sum(map(samples.titles, worker)) for worker in step]
        for step in Schedule(len(samples), 1, workers=2, batch_size=256, micro_batch_size=64).divide(samples, seed=0)
    ]
    assert sum(map(max, titles)) < 1.05 * np.sum(titles) / 2


def test_only_titles_that_several_samples_share_run_once() -> None:
    starts, stops = np.array([0, 0, 0, 7]), np.array([1, 2, 3, 9])
    samples = SampleTable(np.zeros(10, np.int32), starts, stops, np.arange(4))
    assert samples.titles(np.arange(4)) == 3 + 2 + 4


def test_samples_of_a_window_stay_together_and_epochs_differ() -> None:
    samples = table(30)
    first, second = samples.epoch(0, 0), samples.epoch(0, 1)
    assert (np.diff(samples.starts[first]) != 0).sum() == np.unique(samples.starts).size - 1
    assert first.tolist() != second.tolist() != samples.epoch(1, 1).tolist()
    assert first.tolist() == samples.epoch(0, 0).tolist()


def test_the_table_has_the_samples_of_one_split(tmp_path: Path) -> None:
    dataset, config = write_dataset(tmp_path, users=100), config_of(tmp_path)
    train = SampleTable.read(dataset, Split.TRAIN, config, None)
    assert sorted(train.ids.tolist()) == expected_ids(tmp_path)
    valid = SampleTable.read(dataset, Split.VALID, config, None)
    assert len(valid) == 100
    assert not set(valid.ids) & set(train.ids)
    some = SampleTable.read(dataset, Split.TRAIN, config, 300)
    assert 200 < len(some) < 400
    assert set(some.ids) < set(train.ids)


def test_the_table_has_the_windows_of_the_samples_and_no_other_items(tmp_path: Path) -> None:
    """With a stride of 3, windows overlap, and the targets of validation and test are in no window."""
    changes = {"history.max_items": 3, "history.stride": 3}
    dataset, config = write_dataset(tmp_path, users=100), config_of(tmp_path, **changes)
    table, expected, interactions = SampleTable.read(dataset, Split.TRAIN, config, 150), {}, 0
    for batch in iter_samples(dataset, Split.TRAIN):
        for samples in batch.in_fraction(config.history, 150 / 900).by_user():
            starts = samples.window_starts(config.history)
            for sample_id, start, stop in zip(samples.sample_ids, starts, samples.stops, strict=True):
                expected[int(sample_id)] = samples.items[start : stop + 1].tolist()
            seen = {
                place for start, stop in zip(starts, samples.stops, strict=True) for place in range(start, stop + 1)
            }
            interactions += len(seen)
    found = {
        int(sample_id): table.items[start : stop + 1].tolist()
        for sample_id, start, stop in zip(table.ids, table.starts, table.stops, strict=True)
    }
    assert found == expected
    assert table.items.size == interactions


def test_an_unknown_item_is_refused(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, users=3)
    items = dataset.items().slice(0, 5)
    dataset.items = lambda: items  # type: ignore[method-assign]
    with pytest.raises(InputError, match="not among the 5 items"):
        SampleTable.read(dataset, Split.TRAIN, config_of(tmp_path), None)


def test_a_sample_becomes_its_prompt_and_the_next_title() -> None:
    samples, tokenizer = table(), tiny_tokenizer()
    batch = phraser().phrase(samples, np.array([6, 0]))
    texts = [tokenizer.decode(batch.sequences[n]) for n in range(2)]
    prompt, window = Config().prompt, samples.items[4:7]
    history, title = "".join(f"{TITLES[i]}\n" for i in window), f"{TITLES[samples.items[7]]}\n"
    assert texts[0] == prompt.prefix + history + prompt.suffix + title
    titles = [tokenizer.decode(batch.sequences[n][-batch.target_lengths[n] :]) for n in range(2)]
    assert titles == [f"{TITLES[samples.items[7]]}\n", f"{TITLES[samples.items[1]]}\n"]
    assert batch.ids.tolist() == [6, 0]


def test_a_prompt_longer_than_the_context_loses_its_oldest_items() -> None:
    whole, short = (phraser(length).phrase(table(), np.array([3])) for length in (10_000, 35))
    assert short.sequences.lengths[0] <= 35 < whole.sequences.lengths[0]
    assert short.sequences[0][-12:].tolist() == whole.sequences[0][-12:].tolist()
    assert short.target_lengths == whole.target_lengths


def test_the_best_epoch_has_the_smallest_validation_loss() -> None:
    progress = Progress()
    for loss, best in ((3.0, True), (2.0, True), (2.0, False), (2.5, False)):
        progress.epoch_loss, progress.epoch_samples = 10.0, 5
        assert progress.end_epoch(loss) == best
    assert progress.best_epoch == 2
    assert progress.losses[1] == {"epoch": 2, "step": 0, "train_loss": 2.0, "valid_loss": 2.0}


def test_a_loss_that_is_not_finite_is_never_the_best() -> None:
    progress = Progress()
    for loss, best in ((float("nan"), 0), (2.0, 2), (float("inf"), 2), (float("nan"), 2), (1.0, 5)):
        progress.epoch_loss, progress.epoch_samples = 10.0, 5
        progress.end_epoch(loss)
        assert progress.best_epoch == best


def test_the_learning_rate_rises_to_its_full_value_and_falls() -> None:
    rates = [learning_rate_factor(step, 4, 40) for step in range(40)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(later < rate for rate, later in pairwise(rates[4:]))
    assert 0 < rates[-1] < 0.01
    assert learning_rate_factor(0, 0, 1) == 1


def test_the_digest_of_a_run_depends_on_what_decides_its_weights(tmp_path: Path) -> None:
    def run(**changes: object) -> str:
        return run_digest(config_of(tmp_path, **changes), "model", "dataset")

    assert run() == run(**{"finetune.checkpoint_steps": 3, "finetune.max_failures": 0, "memory.num_shards": 3})
    assert len({run(), run(**{"finetune.rank": 4}), run(**{"history.stride": 1}), run(**{"prompt.suffix": "x"})}) == 4
    assert run() != run_digest(config_of(tmp_path), "other", "dataset")

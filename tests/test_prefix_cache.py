"""The cache changes no state; then the entries it keeps."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.small_workspace import config_of
from support.tiny_models import load_tiny, needs_int8, save_tiny
from torch import Tensor

from l2d_ray.config import ModelConfig
from l2d_ray.core.packing import IntArray, Prompts, plan_forest
from l2d_ray.encoding import HistoryEncoder
from l2d_ray.models.backbone import Backbone, load_backbone
from l2d_ray.models.hidden_states import HiddenStates, packed_states, padded_states, relative_error
from l2d_ray.models.prefix_cache import MAX_SEGMENTS, PrefixCache, Segment

FAMILIES = ["llama", "qwen3", "gpt2"]
ITEM_TOKENS = [np.arange(10 * n, 10 * n + size, dtype=np.int32) for n, size in enumerate([3, 9, 5, 1, 7], start=3)]
PREFIX, SUFFIX = np.array([7, 8], np.int32), np.array([9, 9, 5], np.int32)
LARGE = 10**9
BYTES_PER_TOKEN = 2 * 2 * 32 * 2
"""Bytes of one layer in the entries that `keep` makes: keys and values of two heads of 32 float16 numbers."""


def phrase(history: Sequence[int], suffix: NDArray[np.int32] = SUFFIX) -> tuple[NDArray[np.int32], IntArray]:
    """Return the prompt of a history, and its length at the end of each item."""
    pieces = [ITEM_TOKENS[item] for item in history]
    return np.concatenate([PREFIX, *pieces, suffix]), PREFIX.size + np.cumsum([piece.size for piece in pieces])


class Checked:
    """A cache that checks itself: it runs histories with and without the cache and compares the states."""

    def __init__(self, backbone: Backbone, max_bytes: int = LARGE, size: int = 1000) -> None:
        self.backbone, self.size, self.cache = backbone, size, PrefixCache(max_bytes)

    def __call__(self, *histories: Sequence[int], suffix: NDArray[np.int32] = SUFFIX) -> HiddenStates:
        phrased = [phrase(history, suffix) for history in histories]
        prompts = Prompts.join([tokens for tokens, _ in phrased])
        boundaries = [ends for _, ends in phrased]
        result = packed_states(self.backbone, prompts, self.size, self.cache, boundaries)
        assert relative_error(result.states, packed_states(self.backbone, prompts, self.size).states) < 1e-5
        assert relative_error(result.states, padded_states(self.backbone, prompts, 1).states) < 1e-5
        assert self.cache.bytes <= self.cache.max_bytes
        entries = self.cache._entries.values()
        assert self.cache.bytes == sum(layer.nbytes for entry in entries for segment in entry for layer in segment)
        return result


@pytest.mark.parametrize("size", [2, 7, 1000])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_growing_history_runs_its_new_tokens_only(load: Callable[[str], Backbone], family: str, size: int) -> None:
    run = Checked(load(family), size=size)
    history = [0, 1, 2, 3, 4, 1, 0]
    assert run(history[:1]).tokens == phrase(history[:1])[0].size
    saved = 0
    for length in range(2, len(history) + 1):
        assert run(history[:length]).tokens == ITEM_TOKENS[history[length - 1]].size + SUFFIX.size
        saved += phrase(history[: length - 1])[1][-1]
    assert (run.cache.hits, run.cache.misses, run.cache.tokens_saved) == (6, 1, saved)
    assert run(history).tokens == SUFFIX.size  # only the suffix is new
    assert len(run.cache._entries) == 1  # one user, one entry


@pytest.mark.parametrize("size", [3, 16, 1000])
@pytest.mark.parametrize("family", FAMILIES)
def test_known_and_new_histories_run_together(load: Callable[[str], Backbone], family: str, size: int) -> None:
    run = Checked(load(family), size=size)
    run([0, 1, 2], [3, 3], [4, 1, 1, 1])
    result = run(
        [2, 2],  # new
        [0, 1, 2, 4, 4],  # known
        [0, 1, 2, 4, 3],  # extends the same history
        [0, 1, 2],  # fully known
        [3, 3, 0],
        [3, 3, 0],  # repeated
        [4],  # the beginning of a known history
        [0],
    )
    new = [[2, 2], [0, 1, 2, 4, 4], [0, 1, 2, 4, 3], [0, 1, 2], [3, 3, 0], [4], [0]]
    distinct = plan_forest(Prompts.join([phrase(history)[0] for history in new])).tokens.size
    known = PREFIX.size + sum(ITEM_TOKENS[item].size for item in [0, 1, 2, 3, 3])
    assert result.tokens == distinct - known
    assert run.cache.hits == 5


@pytest.mark.parametrize("size", [2, 1000])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_suffix_prompts_are_prefixes_of_each_other(
    load: Callable[[str], Backbone], family: str, size: int
) -> None:
    run, nothing = Checked(load(family), size=size), SUFFIX[:0]
    run([0, 1, 2], suffix=nothing)
    assert run([0, 1, 2], suffix=nothing).tokens == 1  # the last token runs for its state
    assert run([0, 1, 2, 3, 4], suffix=nothing).tokens == ITEM_TOKENS[3].size + ITEM_TOKENS[4].size
    run([0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4, 4], [0], suffix=nothing)
    run([0, 1, 2, 3, 4, 4, 1], [0, 1, 2, 3], suffix=nothing)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_can_use_an_entry_that_it_evicts(load: Callable[[str], Backbone], family: str) -> None:
    probe = Checked(load(family))
    probe([0, 1, 2])
    run = Checked(load(family), max_bytes=probe.cache.bytes * 3 // 2, size=4)
    run([0, 1, 2])
    assert run([3, 1, 4], [0, 1, 2, 4], [4, 4]).tokens < sum(phrase(h)[0].size for h in ([3, 1, 4], [0, 2, 4], [4, 4]))
    assert run.cache.hits == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_history_that_is_found_whole_and_evicted_is_kept_again(load: Callable[[str], Backbone], family: str) -> None:
    probe = Checked(load(family))
    probe([3, 1, 4])
    run = Checked(load(family), max_bytes=probe.cache.bytes * 3 // 2, size=4)
    run([3, 1, 4])
    run([0, 1, 2], [3, 1, 4])  # the first evicts what the second has found
    assert list(run.cache._entries) == list(probe.cache._entries)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=5), max_size=6),
    st.sampled_from([0, 4_000, 12_000, 30_000, LARGE]),
    st.integers(1, 60),
    st.booleans(),
)
def test_the_cache_never_changes_a_state(
    load: Callable[[str], Backbone], batches: list[list[list[int]]], max_bytes: int, size: int, has_suffix: bool
) -> None:
    run = Checked(load("llama"), max_bytes, size)
    for batch in batches:
        run(*batch, suffix=SUFFIX if has_suffix else SUFFIX[:0])


def keep(cache: PrefixCache, *items: int) -> list[Tensor]:
    """Cache a prompt of one-token items with random keys and values of two layers, and return these."""
    prompt = np.array(items, np.int32)
    layers = list(torch.randn(2, prompt.size + 100, 4, 32).half())
    ends, keys = np.arange(1, prompt.size), np.arange(prompt.size) + 50
    found = cache.lookup(prompt, ends)
    cache.keep(prompt, ends, found, keys, lambda rows: [layer[torch.from_numpy(rows)] for layer in layers])
    return layers


def look(cache: PrefixCache, *items: int) -> Segment:
    """Return the keys and values of the longest beginning, its segments joined; an empty list if there is none."""
    found = cache.lookup(np.array(items, np.int32), np.arange(1, len(items)))
    return [torch.cat(tensors) for tensors in zip(*found, strict=True)]


def test_an_entry_is_a_copy_of_the_prompt_without_its_suffix() -> None:
    cache = PrefixCache(LARGE)
    layers = keep(cache, 1, 2, 3, 9)
    found = look(cache, 1, 2, 3, 4, 9)
    assert cache.bytes == 3 * BYTES_PER_TOKEN * 2
    for layer, whole in zip(found, layers, strict=True):
        assert (layer == whole[50:53]).all()
        assert layer.untyped_storage().nbytes() == layer.nbytes


def test_the_longest_beginning_is_found() -> None:
    cache = PrefixCache(LARGE)
    keep(cache, 1, 2, 3, 9)
    keep(cache, 1, 9)  # shorter
    assert len(look(cache, 1, 2, 3, 4, 9)[0]) == 3
    assert len(look(cache, 1, 2, 4, 9)[0]) == 1
    assert look(cache, 2, 3, 9) == []
    # Each that is kept was looked for before.
    assert (cache.hits, cache.misses, cache.tokens_saved) == (2, 3, 4)


def test_a_longer_history_replaces_the_shorter_one() -> None:
    cache = PrefixCache(LARGE)
    keep(cache, 1, 2, 9)
    keep(cache, 1, 2, 3, 9)
    assert cache.bytes == 3 * BYTES_PER_TOKEN * 2
    assert look(cache, 1, 2, 9) == []


def test_a_longer_history_takes_over_the_segments_of_the_shorter_one() -> None:
    cache, history, whole = PrefixCache(LARGE), [1], list[Segment]()
    for item in range(2, 2 * MAX_SEGMENTS):
        before = cache.lookup(np.array([*history, 9], np.int32), np.arange(1, len(history) + 1))
        history.append(item)
        layers = keep(cache, *history, 9)
        after = cache.lookup(np.array([*history, 9], np.int32), np.arange(1, len(history) + 1))
        start = 50 + sum(len(segment[0]) for segment in before)
        whole.append([layer[start : 50 + len(history)] for layer in layers])
        for found, parts in zip(look(cache, *history, 9), zip(*whole, strict=True), strict=True):
            assert torch.equal(found, torch.cat(parts))
        if len(before) < MAX_SEGMENTS:
            shared = zip(before, after, strict=False)
            assert all(old is new for old, new in shared)
            assert len(after) == len(before) + 1
        else:
            assert len(after) == 1
        assert cache.bytes == len(history) * BYTES_PER_TOKEN * 2


def test_the_least_recently_used_entries_are_evicted() -> None:
    cache = PrefixCache(6 * BYTES_PER_TOKEN * 2)
    for item in (1, 2, 3):
        keep(cache, item, item, 9)
    look(cache, 1, 1, 9)
    keep(cache, 4, 4, 9)
    assert [len(look(cache, item, item, 9)) for item in (1, 2, 3, 4)] == [2, 0, 2, 2]
    keep(cache, 5, 5, 5, 5, 9)  # evicts two entries
    assert [len(look(cache, item, item, 9)) for item in (1, 3, 4)] == [0, 0, 2]
    assert cache.bytes == cache.max_bytes


@pytest.mark.parametrize("max_bytes", [0, 5 * BYTES_PER_TOKEN * 2])
def test_an_entry_larger_than_the_cache_is_not_kept(max_bytes: int) -> None:
    cache = PrefixCache(max_bytes)
    keep(cache, 1, 2, 9)
    bytes_before = cache.bytes
    keep(cache, 1, 2, 3, 4, 5, 6, 9)
    assert cache.bytes == bytes_before <= max_bytes
    assert len(look(cache, 1, 2, 3, 9)) == (2 if max_bytes else 0)


def test_a_prompt_without_items_is_neither_found_nor_kept() -> None:
    cache = PrefixCache(LARGE)
    keep(cache, 9)
    assert look(cache, 9) == []
    assert cache.bytes == 0


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 5e-2), pytest.param("int8", 1e-3, marks=needs_int8)]
)
@pytest.mark.parametrize("suffix", ["", "Next:"])
def test_the_encoder_runs_new_tokens_only(tmp_path: Path, dtype: str, tolerance: float, suffix: str) -> None:
    titles = [f"Title {n} of the year" for n in range(12)]
    backbone = load_backbone(ModelConfig(name=save_tiny(tmp_path / "model")), dtype)
    config = config_of(tmp_path, **{"prompt.suffix": suffix})
    encoder = HistoryEncoder(config, titles, backbone, cache_bytes=LARGE)
    plain = HistoryEncoder(config, titles, backbone)
    history, other = [*range(9), "a title outside the catalogue"], encoder.phrased([11])
    again = max(other.tokens.size - other.boundaries[-1], 1)  # the last token always runs
    known = 0
    for length in range(1, 11):
        phrased = encoder.phrased(history[:length])
        assert (phrased.tokens == plain.phrase(history[:length])).all()
        result, expected = encoder.run([phrased, other]), plain.run([phrased, other])
        assert relative_error(result.states, expected.states) < tolerance
        if length > 1:
            assert result.tokens == phrased.tokens.size - known + again < expected.tokens
        known = phrased.boundaries[-1]
    assert (encoder.cache.hits, encoder.cache.misses) == (18, 2)
    assert (plain.cache.hits, plain.cache.misses, plain.cache.bytes) == (0, 0, 0)


def test_a_model_that_cannot_run_packed_does_not_use_the_cache(tmp_path: Path) -> None:
    backbone = load_tiny(tmp_path, "mamba")
    encoder = HistoryEncoder(config_of(tmp_path), ["a", "b"], backbone, cache_bytes=LARGE)
    phrased = [encoder.phrased([0, 1])]
    assert (encoder.run(phrased).states == encoder.run(phrased).states).all()
    assert (encoder.cache.hits, encoder.cache.bytes) == (0, 0)

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2d_ray.core.packing import PrefixForest, Prompts, plan_forest, plan_targets, skip_known, split_chunks

# Few different tokens, so that prompts share prefixes. Some exceed a byte, so that the order must be numeric.
TOKENS = st.sampled_from([0, 1, 255, 256, 70_000])
SEQUENCES = st.lists(st.lists(TOKENS, min_size=1, max_size=9), min_size=1, max_size=14)


def joined(sequences: list[list[int]]) -> Prompts:
    return Prompts.join([np.array(sequence, np.int32) for sequence in sequences])


@st.composite
def related(draw: st.DrawFn) -> list[list[int]]:
    """Draw prompts that include duplicates and prefixes of each other."""
    sequences = draw(SEQUENCES)
    chosen = st.sampled_from(sequences)
    prefixes = draw(st.lists(st.tuples(chosen, st.integers(1, 9)), max_size=6))
    return draw(st.permutations(sequences + [sequence[:length] for sequence, length in prefixes]))


@st.composite
def partly_known(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    """Draw related prompts, and how many first tokens of each are known."""
    sequences = draw(related())
    return sequences, [draw(st.integers(0, len(sequence))) for sequence in sequences]


def test_joined_prompts_can_be_read_back() -> None:
    prompts = joined([[1, 2], [3], [1, 2, 4]])
    assert len(prompts) == 3
    assert prompts.lengths.tolist() == [2, 1, 3]
    assert [prompts[n].tolist() for n in range(3)] == [[1, 2], [3], [1, 2, 4]]
    assert len(Prompts.join([])) == 0


def test_a_forest_worked_out_by_hand() -> None:
    forest = plan_forest(joined([[5, 6, 8], [5, 6, 7], [9], [5, 6, 7], [5]]))
    assert forest.tokens.tolist() == [5, 6, 7, 8, 9]
    assert forest.positions.tolist() == [0, 1, 2, 2, 0]
    assert forest.ends.tolist() == [4, 4, 3, 4, 5]
    assert forest.leaves.tolist() == [3, 2, 4, 2, 0]


@given(related())
def test_each_leaf_sees_exactly_its_prompt(sequences: list[list[int]]) -> None:
    forest = plan_forest(joined(sequences))
    assert len(forest.leaves) == len(sequences)
    for sequence, leaf in zip(sequences, forest.leaves, strict=True):
        keys = np.arange(forest.tokens.size)
        seen = np.flatnonzero((keys <= leaf) & (leaf < forest.ends))
        assert forest.tokens[seen].tolist() == sequence
        assert forest.positions[seen].tolist() == list(range(len(sequence)))


@given(related())
def test_every_distinct_prefix_is_one_token(sequences: list[list[int]]) -> None:
    prefixes = {tuple(sequence[:length]) for sequence in sequences for length in range(1, len(sequence) + 1)}
    assert plan_forest(joined(sequences)).tokens.size == len(prefixes)


@given(related(), st.integers(1, 200))
def test_each_leaf_of_a_chunk_sees_exactly_its_prompt(sequences: list[list[int]], size: int) -> None:
    found: dict[int, list[int]] = {}
    keys: list[tuple[int, int]] = []  # (token, position) of the previous chunk's keys
    for chunk in split_chunks(plan_forest(joined(sequences)), size):
        new_keys = zip(chunk.tokens.tolist(), chunk.positions.tolist(), strict=True)
        keys = [*(keys[k] for k in chunk.path), *new_keys]
        assert len(keys) == len(chunk.ends)
        for n, leaf in zip(chunk.prompts, chunk.leaves, strict=True):
            query = len(chunk.path) + leaf
            seen = [keys[k] for k in range(len(keys)) if k <= query < chunk.ends[k]]
            assert n not in found
            assert [position for _, position in seen] == list(range(len(seen)))
            found[int(n)] = [token for token, _ in seen]
    assert [found[n] for n in range(len(sequences))] == sequences


@given(related(), st.integers(1, 200))
def test_chunks_hold_the_forest_in_order(sequences: list[list[int]], size: int) -> None:
    forest = plan_forest(joined(sequences))
    chunks = list(split_chunks(forest, size))
    assert np.concatenate([chunk.tokens for chunk in chunks]).tolist() == forest.tokens.tolist()
    assert np.concatenate([chunk.positions for chunk in chunks]).tolist() == forest.positions.tolist()
    assert {len(chunk.tokens) for chunk in chunks[:-1]} <= {size}
    assert 0 < len(chunks[-1].tokens) <= size


@given(related(), st.integers(1, 200))
def test_the_path_of_a_chunk_is_shorter_than_a_prompt(sequences: list[list[int]], size: int) -> None:
    longest = max(map(len, sequences))
    for chunk in split_chunks(plan_forest(joined(sequences)), size):
        assert len(chunk.path) < longest
        assert len(chunk.ends) == len(chunk.path) + len(chunk.tokens)


def test_a_forest_with_known_tokens_worked_out_by_hand() -> None:
    sequences, lengths = [[5, 6, 8], [5, 6, 7], [9, 9], [5, 4, 3, 2], [5, 4, 3]], [1, 2, 0, 3, 0]
    forest = skip_known(plan_forest(joined(sequences)), np.array(lengths))
    assert forest.tokens.tolist() == [3, 2, 7, 8, 9, 9]  # 3 runs because it ends a prompt
    assert forest.positions.tolist() == [2, 3, 2, 2, 0, 1]
    assert forest.known.tolist() == [3, 4, 2]  # 5 and 4 of the fourth prompt, 6 of the second
    assert forest.starts.tolist() == [0, 0, 2, 0, 1, 2, 3, 4, 5]
    assert forest.ends.tolist() == [4, 2, 4, 2, 2, 3, 4, 6, 6]
    assert forest.leaves.tolist() == [3, 2, 5, 1, 0]


@given(partly_known(), st.integers(1, 200))
def test_each_leaf_sees_exactly_its_prompt_with_known_tokens(
    example: tuple[list[list[int]], list[int]], size: int
) -> None:
    sequences, lengths = example
    forest = skip_known(plan_forest(joined(sequences)), np.array(lengths))
    beginnings = [sequence[:length] for sequence, length in zip(sequences, lengths, strict=True)]
    keys = [(token, position) for beginning in beginnings for position, token in enumerate(beginning)]
    found: dict[int, list[int]] = {}
    for chunk in split_chunks(forest, size):
        new_keys = zip(chunk.tokens.tolist(), chunk.positions.tolist(), strict=True)
        keys = [*(keys[k] for k in chunk.path), *new_keys]
        assert len(keys) == len(chunk.starts) == len(chunk.ends)
        for n, leaf in zip(chunk.prompts, chunk.leaves, strict=True):
            seen = [keys[k] for k in chunk.seen(int(leaf))]
            assert [position for _, position in seen] == list(range(len(seen)))
            found[int(n)] = [token for token, _ in seen]
    assert [found[n] for n in range(len(sequences))] == sequences


@given(partly_known())
def test_known_tokens_are_not_run(example: tuple[list[list[int]], list[int]]) -> None:
    sequences, lengths = example
    prefixes = {tuple(sequence[:length]) for sequence in sequences for length in range(1, len(sequence) + 1)}
    known = {
        tuple(sequence[:length])
        for sequence, limit in zip(sequences, lengths, strict=True)
        for length in range(1, limit + 1)
    }
    ended = {prefix for prefix in prefixes for sequence in sequences if prefix[: len(sequence)] == tuple(sequence)}
    forest = skip_known(plan_forest(joined(sequences)), np.array(lengths))
    assert forest.tokens.size == len(prefixes - (known - ended))
    assert forest.known.size == len(known - ended)


def test_the_plan_does_not_depend_on_the_order_of_the_prompts() -> None:
    random = np.random.default_rng(0)
    sequences = [random.integers(0, 3, random.integers(1, 12)).tolist() for _ in range(300)]
    order = random.permutation(300)
    one, other = plan_forest(joined(sequences)), plan_forest(joined([sequences[n] for n in order]))
    for name in ("tokens", "positions", "ends"):
        assert (getattr(one, name) == getattr(other, name)).all()
    assert (one.leaves[order] == other.leaves).all()


def test_a_user_needs_one_trunk_and_a_suffix_for_each_sample() -> None:
    history, suffix = list(range(100)), [500, 501]
    forest: PrefixForest = plan_forest(joined([history[:length] + suffix for length in range(1, 101)]))
    assert forest.tokens.size == 100 + 100 * 2


@pytest.mark.parametrize(("sequences", "problem"), [([[1], []], "empty prompt"), ([], "needs a prompt")])
def test_empty_prompts_and_batches_are_refused(sequences: list[list[int]], problem: str) -> None:
    with pytest.raises(AssertionError, match=problem):
        plan_forest(joined(sequences))


def test_targets_worked_out_by_hand() -> None:
    forest = plan_forest(joined([[5, 6, 8], [5, 6, 7, 9], [5, 6, 7, 9]]))
    targets = plan_targets(forest, np.array([1, 2, 1]))
    assert forest.tokens.tolist() == [5, 6, 7, 9, 8]
    assert targets.tokens.tolist() == [7, 9, 8]
    assert targets.parents.tolist() == [1, 2, 1]
    assert targets.weights.tolist() == [0.5, 1.5, 1.0]


@given(related(), st.randoms())
def test_each_target_is_predicted_from_the_tokens_before_it(sequences: list[list[int]], random: Random) -> None:
    sequences = [[3, *sequence] for sequence in sequences]
    lengths = np.array([random.randint(1, len(sequence) - 1) for sequence in sequences])
    forest = plan_forest(joined(sequences))
    targets = plan_targets(forest, lengths)
    expected: dict[tuple[int, ...], float] = {}
    for sequence, length in zip(sequences, lengths, strict=True):
        for stop in range(len(sequence) - length, len(sequence)):
            expected[tuple(sequence[: stop + 1])] = expected.get(tuple(sequence[: stop + 1]), 0) + 1 / length
    found = {}
    keys = np.arange(forest.tokens.size)
    for parent, token, weight in zip(targets.parents, targets.tokens, targets.weights, strict=True):
        before = forest.tokens[(keys <= parent) & (parent < forest.ends)].tolist()
        found[(*before, int(token))] = weight
    assert found == pytest.approx(expected)
    assert targets.weights.sum() == pytest.approx(len(sequences))

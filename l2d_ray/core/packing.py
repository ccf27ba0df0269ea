"""Prefix-tree packing: run every distinct token of a batch of prompts once.

The samples of one user have prompts that begin alike. Inserted into a prefix tree, each shared token needs one place in
a packed sequence; a token attends to its ancestors in the tree, its position id is its depth, and the state of a prompt
is read at its leaf. Attention then gives exactly what each prompt alone would give.

The tree is never built. Sorted lexicographically, prompts come in the tree's depth-first order: what a prompt adds to
its predecessor is the tokens after their longest common prefix. In that order the descendants of token j are the tokens
j .. ends[j] - 1, so that token i attends to token j exactly when `j <= i < ends[j]`.

The forest of a whole batch is then streamed through the model in equal chunks, as in chunked prefill: a chunk needs the
keys and values of its own tokens and of those earlier tokens whose subtrees are still open, the *path*, which is never
longer than a prompt. So no token is run twice, chunks can be as small as the processor's cache likes, and a prompt may
be longer than a chunk.

A prompt's beginning whose keys and values are known from an earlier batch is not run again: `skip_known` takes it from
the tokens and leaves it among the keys, as the path of the first chunk. The tokens to run that descend from key j are
still next to each other, so that token i attends to it exactly when `starts[j] <= i < ends[j]`.

The same forest trains: with each sample's title inserted after its prompt, a title's token is predicted from the state
of its parent. A forest's loss is the sum of its samples' losses, and so is its gradient, from each distinct token once.

Planning is integers only; `models/` runs the plan.

Shapes: N prompts, L longest prompt, T distinct tokens to run, K known ones, C tokens of a chunk, P tokens of its path,
Y predicted tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Prompts:
    """N token sequences, one after the other."""

    tokens: NDArray[np.int32]
    """The tokens of all prompts."""
    offsets: IntArray
    """[N + 1] prompt n is `tokens[offsets[n]:offsets[n + 1]]`."""

    @classmethod
    def join(cls, sequences: Sequence[NDArray[np.int32]]) -> "Prompts":
        """The prompts with these tokens."""
        offsets = np.cumsum([0, *(len(sequence) for sequence in sequences)])
        return cls(np.concatenate([np.empty(0, np.int32), *sequences]), offsets)

    @property
    def lengths(self) -> IntArray:
        """[N] tokens of each prompt."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return self.offsets.size - 1

    def __getitem__(self, n: int) -> NDArray[np.int32]:
        return self.tokens[self.offsets[n] : self.offsets[n + 1]]


@dataclass(frozen=True)
class PrefixForest:
    """The distinct tokens of a batch of prompts, in depth-first order. Its keys are K known tokens, then its own T."""

    tokens: IntArray
    """[T] token ids."""
    positions: IntArray
    """[T] depth in the tree, which is the position in every prompt that contains the token."""
    known: IntArray
    """[K] where each known token is among the known tokens of all prompts, one prompt after the other."""
    starts: IntArray
    """[K + T] the first token that descends from each key; a token is its own first descendant."""
    ends: IntArray
    """[K + T] one past the last."""
    leaves: IntArray
    """[N] the token at which each prompt ends, in the order of the prompts given."""


@dataclass(frozen=True)
class Chunk:
    """A slice of a forest. Its *keys* are the P path tokens followed by its own C tokens."""

    tokens: IntArray
    """[C] token ids."""
    positions: IntArray
    """[C] position ids."""
    path: IntArray
    """[P] the path tokens, as indices into the keys of the chunk before; the first chunk's, into the known tokens."""
    starts: IntArray
    """[P + C] the first descendant of each key, in this chunk's keys; query i is key P + i."""
    ends: IntArray
    """[P + C] one past the last."""
    prompts: IntArray
    """The prompts that end in this chunk."""
    leaves: IntArray
    """The token of this chunk at which each of them ends."""

    def seen(self, token: int) -> IntArray:
        """The keys that a token of this chunk attends to, by position: the prompt that ends there."""
        query = self.path.size + token
        return np.flatnonzero((self.starts <= query) & (query < self.ends))


@dataclass(frozen=True)
class TrainingSamples:
    """N samples, each a prompt and the title that came next."""

    sequences: Prompts
    """Prompt and title, joined."""
    target_lengths: NDArray[np.int64]
    """[N] tokens of each title, at the end of its sequence."""
    ids: NDArray[np.int64]
    """[N] sample ids."""

    def __len__(self) -> int:
        return len(self.sequences)


@dataclass(frozen=True)
class Targets:
    """What a forest learns to predict: Y tokens of it, each from the state of its parent."""

    parents: IntArray
    """[Y] the token from whose state the model predicts."""
    tokens: IntArray
    """[Y] the token id that came next."""
    weights: NDArray[np.float32]
    """[Y] weight of each token's loss. They add up to the number of samples."""


def plan_targets(forest: PrefixForest, target_lengths: IntArray) -> Targets:
    """The last `target_lengths[n]` tokens of each sequence n as targets; a sequence has at least one token before them.

    A sample's loss is the mean over its title's tokens, so that every sample counts alike whatever its title.
    """
    parents = _ancestors(forest, np.arange(forest.tokens.size), np.maximum(forest.positions - 1, 0))
    nodes, weights = forest.leaves, np.zeros(forest.tokens.size)
    for step in range(int(target_lengths.max(initial=0))):
        running = step < target_lengths
        np.add.at(weights, nodes[running], 1 / target_lengths[running])
        nodes = np.where(running, parents[nodes], nodes)
    predicted = np.flatnonzero(weights)
    assert (forest.positions[predicted] > 0).all(), "nothing comes before a target"
    return Targets(parents[predicted], forest.tokens[predicted], weights[predicted].astype(np.float32))


def plan_forest(prompts: Prompts) -> PrefixForest:
    """The prefix forest of N prompts, none of them empty. Takes memory in proportion to N times the longest."""
    lengths = prompts.lengths
    assert lengths.min(initial=1) > 0, "an empty prompt has no last token"
    assert lengths.size, "a forest needs a prompt"
    rows = _padded(prompts)
    order = _lexicographic_order(rows)
    rows, lengths = rows[order], lengths[order]
    common = _common_prefixes(rows, lengths)
    depth = np.arange(rows.shape[1])
    is_new = (depth >= common[:, None]) & (depth < lengths[:, None])
    stops = np.cumsum(lengths - common)
    leaves = np.empty_like(stops)
    leaves[order] = stops - 1
    return PrefixForest(
        tokens=rows[is_new].astype(np.int64) - 1,
        positions=np.broadcast_to(depth, is_new.shape)[is_new],
        known=np.empty(0, np.int64),
        starts=np.arange(stops[-1]),
        ends=_subtree_ends(common, depth, starts=stops - (lengths - common), total=int(stops[-1]))[is_new],
        leaves=leaves,
    )


def skip_known(forest: PrefixForest, lengths: IntArray) -> PrefixForest:
    """The forest less what is known: of each prompt n the first `lengths[n]` tokens.

    A token at which a prompt ends is run all the same, for its state, and so is what follows it: no key that is known
    then comes after one that is not.
    """
    prompts = np.repeat(np.arange(lengths.size), lengths)
    places = np.arange(prompts.size)
    depths = places - (np.cumsum(lengths) - lengths)[prompts]
    known = np.full(forest.tokens.size, -1)
    known[_ancestors(forest, forest.leaves[prompts], depths)] = places
    last = np.zeros_like(known)
    last[forest.leaves] = forest.ends[forest.leaves]
    known[np.arange(known.size) < np.maximum.accumulate(last)] = -1
    is_run = known < 0
    numbers = np.append(0, is_run.cumsum())
    keys = np.argsort(is_run, kind="stable")
    return PrefixForest(
        tokens=forest.tokens[is_run],
        positions=forest.positions[is_run],
        known=known[~is_run],
        starts=numbers[keys],
        ends=numbers[forest.ends[keys]],
        leaves=numbers[forest.leaves],
    )


def split_chunks(forest: PrefixForest, tokens_per_chunk: int) -> Iterator[Chunk]:
    """The forest in chunks of `tokens_per_chunk` tokens (the last may be shorter), to be run in this order."""
    by_leaf = np.argsort(forest.leaves, kind="stable")
    sorted_leaves = forest.leaves[by_leaf]
    keys, places = np.arange(forest.known.size), forest.known
    for start in range(0, forest.tokens.size, tokens_per_chunk):
        stop = min(start + tokens_per_chunk, forest.tokens.size)
        path = np.flatnonzero(forest.ends[keys] > start)
        keys = np.concatenate([keys[path], np.arange(start, stop) + forest.known.size])
        own = slice(*np.searchsorted(sorted_leaves, (start, stop)))
        yield Chunk(
            tokens=forest.tokens[start:stop],
            positions=forest.positions[start:stop],
            path=places[path],
            starts=forest.starts[keys] - start + path.size,
            ends=np.minimum(forest.ends[keys], stop) - start + path.size,
            prompts=by_leaf[own],
            leaves=sorted_leaves[own] - start,
        )
        places = np.arange(keys.size)


def _padded(prompts: Prompts) -> NDArray[np.int32]:
    """[N, L] tokens plus one, so that the padding 0 sorts before every token."""
    rows = np.zeros((len(prompts), prompts.lengths.max()), np.int32)
    rows[np.arange(rows.shape[1]) < prompts.lengths[:, None]] = prompts.tokens + 1
    return rows


def _lexicographic_order(rows: NDArray[np.int32]) -> IntArray:
    """[N] the stable order of the rows: big-endian numbers compare like their bytes."""
    comparable = np.ascontiguousarray(rows.astype(">i4")).view(f"V{4 * rows.shape[1]}")
    return np.argsort(comparable.ravel(), kind="stable")


def _common_prefixes(rows: NDArray[np.int32], lengths: IntArray) -> IntArray:
    """[N] tokens that each row shares with the one before it."""
    differs = rows[1:] != rows[:-1]
    first_difference = np.where(differs.any(1), differs.argmax(1), lengths[1:])
    return np.concatenate([[0], first_difference])


def _ancestors(forest: PrefixForest, tokens: IntArray, depths: IntArray) -> IntArray:
    """The ancestor of each token (itself, perhaps) at this depth: the last token so deep that is not after it."""
    total = forest.tokens.size
    keys = np.sort(forest.positions * total + np.arange(total))
    return keys[np.searchsorted(keys, depths * total + tokens, side="right") - 1] % total


def _subtree_ends(common: IntArray, depth: IntArray, starts: IntArray, total: int) -> IntArray:
    """[N, L] a token at depth d ends where the next prompt begins that shares at most d tokens with its predecessor."""
    closes = np.where(common[:, None] <= depth, starts[:, None], total)
    closes[:-1], closes[-1] = closes[1:], total
    return np.minimum.accumulate(closes[::-1])[::-1]

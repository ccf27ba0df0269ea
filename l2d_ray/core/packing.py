"""Prefix-tree packing: run every distinct token of a batch of prompts once.

The prompts of one user's samples begin alike. Inserted into a prefix tree, a shared token takes one place in a packed
sequence. A token attends to its ancestors in the tree, its position id is its depth, and a prompt's state is read at
its leaf. This gives exactly the attention that each prompt would have alone.

The tree is never built. Prompts sorted lexicographically are in the tree's depth-first order: a prompt adds the tokens
after the longest prefix it shares with its predecessor. In this order the descendants of token j are the tokens j to
ends[j] - 1. So token i attends to token j exactly when `j <= i < ends[j]`.

A batch's forest runs through the model in chunks of equal size, as in chunked prefill. A chunk needs the keys and
values of its tokens, and of those earlier tokens that have descendants in it: the *path*, never longer than a prompt.
No token runs twice, a chunk can be small enough for the processor's cache, and a prompt may be longer than a chunk.

The beginning of a prompt is not run when its keys and values are *known* from an earlier batch. `skip_known` removes
these tokens from the tokens to run and keeps them among the keys, as the path of the first chunk. The tokens to run
that descend from key j are still adjacent: token i attends to key j exactly when `starts[j] <= i < ends[j]`.

The same forest trains the model. Each sample's title follows its prompt, and a token of a title is predicted from its
parent's state. The forest's loss is the sum of its samples' losses, and so is its gradient.

This module plans, with integers only; `models/` runs the plan.

Shapes: N prompts, L tokens of the longest prompt, T distinct tokens to run, K known tokens, C tokens of a chunk, P
tokens of its path, Y predicted tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.arrays import IntArray


@dataclass(frozen=True)
class Prompts:
    """N token sequences, concatenated."""

    tokens: NDArray[np.int32]
    """The tokens of all prompts."""
    offsets: IntArray
    """[N + 1]: prompt n is `tokens[offsets[n]:offsets[n + 1]]`."""

    @classmethod
    def join(cls, sequences: Sequence[NDArray[np.int32]]) -> "Prompts":
        """Concatenate these prompts."""
        offsets = np.cumsum([0, *(len(sequence) for sequence in sequences)])
        return cls(np.concatenate([np.empty(0, np.int32), *sequences]), offsets)

    @property
    def lengths(self) -> IntArray:
        """[N] length of each prompt, in tokens."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return self.offsets.size - 1

    def __getitem__(self, n: int) -> NDArray[np.int32]:
        return self.tokens[self.offsets[n] : self.offsets[n + 1]]


@dataclass(frozen=True)
class PrefixForest:
    """The distinct tokens of a batch of prompts, in depth-first order. Its keys are K known tokens, then T to run."""

    tokens: IntArray
    """[T] token ids."""
    positions: IntArray
    """[T] depth in the tree: the token's position in every prompt that contains it."""
    known: IntArray
    """[K] index of each known token in the concatenated known tokens of all prompts."""
    starts: IntArray
    """[K + T] first token to run that descends from each key; for a token to run, the token itself."""
    ends: IntArray
    """[K + T] one past the last descendant of each key."""
    leaves: IntArray
    """[N] last token of each prompt, in the order of the batch."""


@dataclass(frozen=True)
class Chunk:
    """A slice of C tokens of a forest. Its *keys* are the P tokens of its path, then its C tokens."""

    tokens: IntArray
    """[C] token ids."""
    positions: IntArray
    """[C] position ids."""
    path: IntArray
    """[P] path tokens, as indices into the previous chunk's keys; in the first chunk, into the known tokens."""
    starts: IntArray
    """[P + C] first descendant of each key, as an index into this chunk's keys. Token i is key P + i."""
    ends: IntArray
    """[P + C] one past the last descendant of each key."""
    prompts: IntArray
    """Indices of the prompts that end in this chunk."""
    leaves: IntArray
    """Last token of each of these prompts, as an index into this chunk's tokens."""

    def seen(self, token: int) -> IntArray:
        """Return the keys that a token of this chunk attends to, in the order of the prompt that ends with it."""
        query = self.path.size + token
        return np.flatnonzero((self.starts <= query) & (query < self.ends))


@dataclass(frozen=True)
class TrainingSamples:
    """N training samples, each a prompt and the title that came next."""

    sequences: Prompts
    """Prompt and title of each sample, as one sequence."""
    target_lengths: IntArray
    """[N] length of each title, at the end of its sequence, in tokens."""
    ids: IntArray
    """[N] sample ids."""

    def __len__(self) -> int:
        return len(self.sequences)


@dataclass(frozen=True)
class Targets:
    """The Y tokens of a forest that a model learns to predict, each from its parent's state."""

    parents: IntArray
    """[Y] index of the parent in the forest."""
    tokens: IntArray
    """[Y] token id to predict."""
    weights: NDArray[np.float32]
    """[Y] weight of each token's loss. The weights sum to the number of samples."""


def plan_targets(forest: PrefixForest, target_lengths: IntArray) -> Targets:
    """Make targets of the last `target_lengths[n]` tokens of each sequence n, which needs a token before them.

    A sample's loss is the mean over its title's tokens, so every sample counts the same whatever its title's length.
    """
    parents = _ancestors(forest, np.arange(forest.tokens.size), np.maximum(forest.positions - 1, 0))
    nodes, weights = forest.leaves, np.zeros(forest.tokens.size)
    for step in range(int(target_lengths.max(initial=0))):
        running = step < target_lengths
        np.add.at(weights, nodes[running], 1 / target_lengths[running])
        nodes = np.where(running, parents[nodes], nodes)
    predicted = np.flatnonzero(weights)
    assert (forest.positions[predicted] > 0).all(), "a target needs a token before it"
    return Targets(parents[predicted], forest.tokens[predicted], weights[predicted].astype(np.float32))


def plan_forest(prompts: Prompts) -> PrefixForest:
    """Plan the prefix forest of N prompts, none of them empty. Uses memory proportional to N L."""
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
    """Remove the known tokens from the tokens to run: the first `lengths[n]` tokens of each prompt n.

    A prompt's last token still runs, for its state. So do the tokens that follow it in a longer prompt: a known key
    never comes after an unknown one.
    """
    prompts = np.repeat(np.arange(lengths.size), lengths)
    indices = np.arange(prompts.size)
    depths = indices - (np.cumsum(lengths) - lengths)[prompts]
    known = np.full(forest.tokens.size, -1)
    known[_ancestors(forest, forest.leaves[prompts], depths)] = indices
    leaf_ends = np.zeros_like(known)
    leaf_ends[forest.leaves] = forest.ends[forest.leaves]
    known[np.arange(known.size) < np.maximum.accumulate(leaf_ends)] = -1
    is_run = known < 0
    new_index = np.append(0, is_run.cumsum())
    keys = np.argsort(is_run, kind="stable")
    return PrefixForest(
        tokens=forest.tokens[is_run],
        positions=forest.positions[is_run],
        known=known[~is_run],
        starts=new_index[keys],
        ends=new_index[forest.ends[keys]],
        leaves=new_index[forest.leaves],
    )


def split_chunks(forest: PrefixForest, tokens_per_chunk: int) -> Iterator[Chunk]:
    """Split a forest into chunks of `tokens_per_chunk` tokens, to be run in this order. The last may be shorter."""
    by_leaf = np.argsort(forest.leaves, kind="stable")
    sorted_leaves = forest.leaves[by_leaf]
    keys, path_indices = np.arange(forest.known.size), forest.known
    for start in range(0, forest.tokens.size, tokens_per_chunk):
        stop = min(start + tokens_per_chunk, forest.tokens.size)
        path = np.flatnonzero(forest.ends[keys] > start)
        keys = np.concatenate([keys[path], np.arange(start, stop) + forest.known.size])
        ending = slice(*np.searchsorted(sorted_leaves, (start, stop)))
        yield Chunk(
            tokens=forest.tokens[start:stop],
            positions=forest.positions[start:stop],
            path=path_indices[path],
            starts=forest.starts[keys] - start + path.size,
            ends=np.minimum(forest.ends[keys], stop) - start + path.size,
            prompts=by_leaf[ending],
            leaves=sorted_leaves[ending] - start,
        )
        path_indices = np.arange(keys.size)


def _padded(prompts: Prompts) -> NDArray[np.int32]:
    """Return the tokens plus one [N, L], so that the padding 0 sorts before every token."""
    rows = np.zeros((len(prompts), prompts.lengths.max()), np.int32)
    rows[np.arange(rows.shape[1]) < prompts.lengths[:, None]] = prompts.tokens + 1
    return rows


def _lexicographic_order(rows: NDArray[np.int32]) -> IntArray:
    """Return the stable lexicographic order [N] of the rows. Big-endian numbers compare like their bytes."""
    comparable = np.ascontiguousarray(rows.astype(">i4")).view(f"V{4 * rows.shape[1]}")
    return np.argsort(comparable.ravel(), kind="stable")


def _common_prefixes(rows: NDArray[np.int32], lengths: IntArray) -> IntArray:
    """Return how many tokens [N] each row shares with the row before it."""
    differs = rows[1:] != rows[:-1]
    first_difference = np.where(differs.any(1), differs.argmax(1), lengths[1:])
    return np.concatenate([[0], first_difference])


def _ancestors(forest: PrefixForest, tokens: IntArray, depths: IntArray) -> IntArray:
    """Return the ancestor of each token at a depth: the last token of that depth that is not after it."""
    total = forest.tokens.size
    keys = np.sort(forest.positions * total + np.arange(total))
    return keys[np.searchsorted(keys, depths * total + tokens, side="right") - 1] % total


def _subtree_ends(common: IntArray, depth: IntArray, starts: IntArray, total: int) -> IntArray:
    """Return one past the last descendant [N, L] of each token.

    The descendants of a token at depth d end where the next prompt begins that shares at most d tokens with its
    predecessor.
    """
    closes = np.where(common[:, None] <= depth, starts[:, None], total)
    closes[:-1], closes[-1] = closes[1:], total
    return np.minimum.accumulate(closes[::-1])[::-1]

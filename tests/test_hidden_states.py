import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from support.tiny_models import load_tiny, needs_int8, save_tiny
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_mask
from torch.nn.attention.flex_attention import flex_attention as eager_flex_attention

from l2d_ray.config import ModelConfig, PromptConfig
from l2d_ray.core.packing import Chunk, Prompts, plan_forest, skip_known, split_chunks
from l2d_ray.core.samples import window_starts
from l2d_ray.models import flex_attention, tree_attention
from l2d_ray.models.backbone import Backbone, load_backbone
from l2d_ray.models.hidden_states import TOLERANCE, extractor, packed_states, padded_states, relative_error
from l2d_ray.models.tree_attention import ForestState, prefix_tree_attention
from l2d_ray.prompts import PromptEncoder

FAMILIES = ["llama", "qwen2", "qwen3", "gpt2"]
TITLES = [
    *(f"Title {n}, part {n % 3} of the year" for n in range(20)),
    "Next:\nNext:",
    "The user watched or bought, in this order:\n",
    "{title}",
    "\n\n",
    "",
    "七人の侍",
    "😀👩‍👩‍👧 emoji",
    "e\u0301 combining \u0301\u0308",
]
CHUNK_SIZES = [7, 64, 1000]


def phrased(backbone: Backbone, stride: int) -> Prompts:
    """Phrase every sample of six users: one with a long history, two with the same one, some with few items."""
    encoder = PromptEncoder(PromptConfig(suffix="Next:", max_item_tokens=9), backbone.tokenizer, TITLES)
    random = np.random.default_rng(3)
    long, short = random.integers(0, len(TITLES), 22), random.integers(0, len(TITLES), 6)
    sequences = []
    for history in (long, short, short, long[:1], np.arange(20, 28), np.array([20])):
        stops = np.arange(1, len(history) + 1)
        sequences += encoder.encode(history.astype(np.int32), window_starts(stops, 8, stride), stops)
    return Prompts.join(sequences)


def run_singly(backbone: Backbone, prompts: Prompts) -> Tensor:
    """Compute the states of the prompts one at a time."""
    return padded_states(backbone, prompts, batch_size=1).states


@pytest.mark.parametrize("stride", [1, 10])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_states_equal_those_of_single_prompts(load: Callable[[str], Backbone], family: str, stride: int) -> None:
    backbone = load(family)
    prompts = phrased(backbone, stride)
    expected = run_singly(backbone, prompts)
    assert prompts.lengths.max() > 64
    for size in CHUNK_SIZES:
        packed = packed_states(backbone, prompts, size)
        assert relative_error(packed.states, expected) < 1e-5
        assert packed.tokens == plan_forest(prompts).tokens.size < prompts.tokens.size


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_states_equal_those_of_single_prompts(load: Callable[[str], Backbone], family: str) -> None:
    backbone = load(family)
    prompts = phrased(backbone, 10)
    padded = padded_states(backbone, prompts, batch_size=16)
    assert relative_error(padded.states, run_singly(backbone, prompts)) < 1e-5
    assert padded.tokens == prompts.tokens.size


@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_depends_on_the_whole_prompt(load: Callable[[str], Backbone], family: str) -> None:
    """Show that the equality tests of this file can fail."""
    backbone = load(family)
    tokens = np.arange(10, 30, dtype=np.int32)
    changed = tokens.copy()
    changed[0] = 99
    states = packed_states(backbone, Prompts.join([tokens, changed, tokens[::-1]]), 64).states
    assert relative_error(states[1:], states[[0, 0]]) > 1e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_states_are_within_tolerance(
    load: Callable[[str], Backbone], tmp_path_factory: pytest.TempPathFactory, dtype: str
) -> None:
    folder = save_tiny(tmp_path_factory.mktemp(dtype))
    backbone = load_backbone(ModelConfig(name=folder), dtype)
    prompts = Prompts.join([phrased(backbone, 10)[n] for n in range(0, 40, 5)])
    tolerance = TOLERANCE[dtype]
    expected = run_singly(load("llama"), prompts)
    assert relative_error(packed_states(backbone, prompts, 64).states, expected) < tolerance
    assert relative_error(run_singly(backbone, prompts), expected) < tolerance


def test_a_model_loading_in_another_thread_changes_no_state(load: Callable[[str], Backbone]) -> None:
    """While transformers builds a model, the default dtype of new tensors changes in all threads."""
    backbone = load("llama")
    prompts = phrased(backbone, 10)
    expected = packed_states(backbone, prompts, 64).states, run_singly(backbone, prompts)
    try:
        torch.set_default_dtype(torch.bfloat16)
        states = packed_states(backbone, prompts, 64).states, run_singly(backbone, prompts)
    finally:
        torch.set_default_dtype(torch.float32)
    for disturbed, undisturbed in zip(states, expected, strict=True):
        assert disturbed.dtype == torch.float32
        assert torch.equal(disturbed, undisturbed)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_references_is_freed_at_once(tmp_path: Path, family: str) -> None:
    """Replicas exchange models, and the garbage collector, which finds cycles, runs rarely in them."""
    backbone = load_backbone(ModelConfig(name=save_tiny(tmp_path, family)))
    packed_states(backbone, phrased(backbone, 10), 64)
    weights = [weakref.ref(weight) for weight in backbone.model.parameters()]
    gc.disable()
    try:
        del backbone
        assert not any(weight() is not None for weight in weights)
    finally:
        gc.enable()


@needs_int8
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_packed_int8_states_equal_unpacked_ones(tmp_path: Path, load: Callable[[str], Backbone], family: str) -> None:
    backbone = load_backbone(ModelConfig(name=save_tiny(tmp_path, family)), "int8")
    prompts = phrased(backbone, 10)
    result, expected = extractor(backbone, 64)(prompts), run_singly(backbone, prompts)
    assert result.tokens == plan_forest(prompts).tokens.size
    assert relative_error(result.states, expected) < 1e-3
    # With only 32 inputs to average over, 8-bit weights err more than in a real model.
    assert 1e-3 < relative_error(expected, run_singly(load(family), prompts)) < 1e-1


@pytest.mark.parametrize("family", [*FAMILIES, "mistral"])
def test_the_extractor_packs_supported_families(load: Callable[[str], Backbone], family: str) -> None:
    backbone = load(family)
    prompts = phrased(backbone, 10)
    result = extractor(backbone, 64)(prompts)
    assert result.tokens == plan_forest(prompts).tokens.size
    assert relative_error(result.states, run_singly(backbone, prompts)) < 1e-5


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma2", {"attn_logit_softcapping": 0.5}),  # passes an argument that prefix_tree attention does not support
        ("gpt_oss", {}),  # passes attention sinks, also unsupported
        ("bloom", {}),  # never calls the attention function
        ("mamba", {}),  # has no attention
    ],
)
def test_the_extractor_pads_unsupported_families(
    tmp_path_factory: pytest.TempPathFactory, family: str, changes: dict[str, float]
) -> None:
    folder = tmp_path_factory.mktemp(family)
    backbone = load_tiny(folder, family, **changes)
    prompts = Prompts.join([np.array(tokens, np.int32) for tokens in ([5, 6, 7, 8, 9], [5, 6, 7], [8])])
    result = extractor(backbone, 64)(prompts)
    assert result.tokens == prompts.tokens.size
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder).base_model
    for n in range(len(prompts)):
        with torch.inference_mode():
            expected = reference(torch.from_numpy(prompts[n].astype(np.int64))[None]).last_hidden_state[:, -1]
        assert relative_error(result.states[n, None], expected) < 1e-5


def test_unsupported_attention_arguments_are_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    backbone = load_tiny(tmp_path_factory.mktemp("gemma2"), "gemma2")
    with pytest.raises(ValueError, match=r"^attention with softcap cannot run packed$"):
        packed_states(backbone, Prompts.join([np.array([5], np.int32)]), 64)


def chunks(sequences: int, size: int, known: bool = False, seed: int = 0) -> list[Chunk]:
    """Split random prompts of up to 120 tokens that share prefixes; with `known`, half of them are partly known."""
    random = np.random.default_rng(seed)
    trunk = random.integers(0, 50, 120)
    prompts = [
        np.concatenate([trunk[: random.integers(0, 100)], random.integers(0, 50, random.integers(1, 20))])
        for _ in range(sequences)
    ]
    joined = Prompts.join([prompt.astype(np.int32) for prompt in prompts])
    lengths = random.integers(0, joined.lengths) * (random.random(sequences) < 0.5) * known
    return list(split_chunks(skip_known(plan_forest(joined), lengths), size))


def visible_keys(chunk: Chunk) -> Tensor:
    """Return which keys each query attends to [C, P + C], by the definition in core/packing.py."""
    queries = len(chunk.path) + np.arange(len(chunk.tokens))[:, None]
    return torch.from_numpy((chunk.starts <= queries) & (queries < chunk.ends))


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("size", [3, 50, 130, 300])
def test_cpu_blocks_show_each_query_its_visible_keys(size: int, known: bool) -> None:
    for chunk in chunks(20, size, known):
        visible = torch.zeros(len(chunk.tokens), len(chunk.ends), dtype=torch.bool)
        for queries, keys, mask in tree_attention._blocks(chunk, torch.float32):
            assert set(mask.unique().tolist()) <= {0.0, -torch.inf}
            visible[torch.arange(queries.start, queries.stop)[:, None], keys] = mask[0, 0] == 0
        assert (visible == visible_keys(chunk)).all()


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("size", [3, 50, 130, 300])
def test_the_gpu_block_mask_shows_each_query_its_visible_keys(size: int, known: bool) -> None:
    for chunk in chunks(20, size, known):
        queries, keys = len(chunk.tokens), len(chunk.ends)
        block_mask = flex_attention.block_mask(chunk, torch.device("cpu"))
        dense = create_mask(block_mask.mask_mod, None, None, queries, keys, device="cpu")[0, 0]
        assert (dense == visible_keys(chunk)).all()
        blocks = block_mask.to_dense()[0, 0].repeat_interleave(128, 0).repeat_interleave(128, 1)
        assert not (dense & (blocks[:queries, :keys] == 0)).any()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("size", [50, 300])
def test_flex_attention_equals_attention_in_cpu_blocks(size: int, known: bool) -> None:
    torch.manual_seed(0)
    before = torch.randn(20 * 120, 4, 8)
    layer, state = nn.Identity(), ForestState(torch.device("cpu"), [[before]])
    other_layer, other_state = nn.Identity(), ForestState(torch.device("cpu"), [[before]])
    for chunk in chunks(20, size, known):
        query, (key, value) = torch.randn(1, 4, len(chunk.tokens), 8), torch.randn(2, 1, 2, len(chunk.tokens), 8)
        state.enter(chunk, torch.float32)
        output, _ = prefix_tree_attention(layer, query, key, value, None, scaling=0.3, forest=state)
        other_state.enter(chunk, torch.float32)
        other_state.extend(other_layer, key, value)
        (keys_and_values,) = other_state.keys_and_values(np.arange(len(chunk.ends)))
        keys, values = tree_attention._split(keys_and_values)
        block_mask = flex_attention.block_mask(chunk, torch.device("cpu"))
        flex = eager_flex_attention(query, keys, values, block_mask=block_mask, scale=0.3, enable_gqa=True)
        assert isinstance(flex, Tensor)
        torch.testing.assert_close(output, flex.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_queries_that_share_keys_share_a_block() -> None:
    """Histories with long known beginnings get a block each; branches of one trunk share blocks of full size."""
    prompts = [np.arange(1000 * n, 1000 * n + 305, dtype=np.int32) for n in range(1, 6)]
    forest = skip_known(plan_forest(Prompts.join(prompts)), np.full(5, 300))
    (chunk,) = split_chunks(forest, 1000)
    blocks = tree_attention._blocks(chunk, torch.float32)
    assert [(queries.start, queries.stop, keys.size) for queries, keys, _ in blocks] == [
        (5 * n, 5 * n + 5, 305) for n in range(5)
    ]
    branches = [np.append(prompts[0], 2000 + n) for n in range(100)]
    (chunk,) = split_chunks(plan_forest(Prompts.join(branches)), 1000)
    sizes = [queries.stop - queries.start for queries, *_ in tree_attention._blocks(chunk, torch.float32)]
    assert sum(sizes) == chunk.tokens.size == 405
    assert sizes.count(tree_attention.QUERIES_PER_BLOCK) == 6

"""Benchmark of packed against one-by-one extraction on the same samples, in alternating runs."""

from dataclasses import dataclass, replace
from itertools import islice
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from l2d_ray.config import Config
from l2d_ray.core.arrays import IntArray
from l2d_ray.core.packing import Prompts, plan_forest, split_chunks
from l2d_ray.data.dataset import Dataset
from l2d_ray.encoding import identify_memory
from l2d_ray.models.backbone import Backbone
from l2d_ray.models.hidden_states import packed_states, padded_states, relative_error
from l2d_ray.models.int8_linear import Int8Linear
from l2d_ray.models.linear_layers import PackedLinear
from l2d_ray.stages.extraction import UnitExtractor, plan_units
from l2d_ray.timing import timed
from l2d_ray.workspace import Workspace

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
GEMM_SIZE = 2048


@dataclass(frozen=True)
class ExtractBenchmark:
    """Medians over the runs. Tokens per second count the tokens that the method itself has to run."""

    speedup: float
    """Seconds of one-by-one extraction over seconds of packed extraction, median of the pairs."""
    relative_error: float
    """Largest distance of a packed state from the one-by-one state, relative to the latter's norm."""
    one_by_one_tokens_per_second: float
    packed_tokens_per_second: float
    gemm_gflops: float
    """GFLOP/s of a float32 matrix product of 2048 x 2048 in the same process."""
    packed_gflops: float
    """GFLOP/s of packed extraction: matrix products of the layers, and attention to ancestors, by distinct token."""
    fraction_of_gemm: float
    """packed_gflops over gemm_gflops."""
    planning_fraction: float
    """Share of the packed run that plans the packing."""
    samples: int
    one_by_one_tokens: int
    packed_tokens: int
    batch_size: int
    """Prompts in a padded batch: the fastest of 1 to 32 for one-by-one extraction."""
    threads: int


def bench_extract(config: Config) -> ExtractBenchmark:
    """Run `bench.samples` training samples of the workspace both ways, `bench.repeats` times in turn."""
    prompts, backbone, tokens_per_chunk = prepare_extraction(config)
    batch_size = _fastest_batch_size(backbone, prompts)
    forest = plan_forest(prompts)
    flop = _flop_per_token(backbone.model) * forest.tokens.size + _attention_flop(backbone, forest.positions)
    gemm, fractions, pairs = [_gemm_gflops(backbone.device)], [], []
    for _ in range(config.bench.repeats):
        slow, expected = timed(lambda: padded_states(backbone, prompts, batch_size))
        gemm.append(_gemm_gflops(backbone.device))
        fast, packed = timed(lambda: packed_states(backbone, prompts, tokens_per_chunk))
        gemm.append(_gemm_gflops(backbone.device))
        pairs.append((slow, fast))
        fractions.append(flop / fast / 1e9 / ((gemm[-1] + gemm[-2]) / 2))
    seconds = median(fast for _, fast in pairs)
    return ExtractBenchmark(
        speedup=round(median(slow / fast for slow, fast in pairs), 3),
        relative_error=relative_error(packed.states, expected.states),
        one_by_one_tokens_per_second=round(prompts.tokens.size / median(slow for slow, _ in pairs), 1),
        packed_tokens_per_second=round(packed.tokens / seconds, 1),
        gemm_gflops=round(median(gemm), 1),
        packed_gflops=round(flop / seconds / 1e9, 1),
        fraction_of_gemm=round(median(fractions), 3),
        planning_fraction=round(_planning_seconds(prompts, tokens_per_chunk) / seconds, 5),
        samples=len(prompts),
        one_by_one_tokens=prompts.tokens.size,
        packed_tokens=packed.tokens,
        batch_size=batch_size,
        threads=torch.get_num_threads(),
    )


def prepare_extraction(config: Config) -> tuple[Prompts, Backbone, int]:
    """Return the prompts of the first `bench.samples` training samples, the model, and the tokens per chunk."""
    whole = config.replace({"memory.units": 1})
    unit = plan_units(whole, Dataset.open(Workspace.open(config.workspace)))[0]
    extractor = UnitExtractor(whole, identify_memory(whole))
    torch.set_num_threads(config.bench.threads or config.workers.cpus)
    batches = extractor.batches(replace(unit, stop=min(unit.stop, config.bench.samples)))
    prompts = islice((prompt for batch in batches for prompt in batch.prompts), config.bench.samples)
    return Prompts.join(list(prompts)), extractor.encoder.backbone, extractor.encoder.tokens_per_chunk


def _fastest_batch_size(backbone: Backbone, prompts: Prompts) -> int:
    """Return the fastest batch size, measured on every eighth sample, or on 32 samples if those are more."""
    some = Prompts.join([prompts[n] for n in range(0, len(prompts), max(1, min(8, len(prompts) // 32)))])
    padded_states(backbone, Prompts.join([some[0]]), 1)
    return min(BATCH_SIZES, key=lambda size: timed(lambda: padded_states(backbone, some, size))[0])


def _planning_seconds(prompts: Prompts, tokens_per_chunk: int) -> float:
    return timed(lambda: list(split_chunks(plan_forest(prompts), tokens_per_chunk)))[0]


def _gemm_gflops(device: torch.device) -> float:
    a, b = torch.randn(2, GEMM_SIZE, GEMM_SIZE, device=device)
    seconds = median(timed(lambda: a @ b)[0] for _ in range(4))
    return 2 * GEMM_SIZE**3 / seconds / 1e9


def _flop_per_token(model: nn.Module) -> int:
    """Return two operations for each weight of the linear layers, which GPT-2 calls Conv1D."""
    linear = (nn.Linear, PackedLinear, Int8Linear, Conv1D)
    return sum(2 * module.weight.numel() for module in model.modules() if isinstance(module, linear))


def _attention_flop(backbone: Backbone, positions: IntArray) -> int:
    """Return the operations of scores and weighted values: two products with each of position + 1 visible keys."""
    architecture: Any = backbone.model.config
    heads = architecture.num_attention_heads
    width = heads * (getattr(architecture, "head_dim", None) or architecture.hidden_size // heads)
    return int(4 * width * architecture.num_hidden_layers * (positions + 1).sum())

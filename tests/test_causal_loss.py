from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_models import tiny_config, tiny_model

from l2d_ray.config import FinetuneConfig
from l2d_ray.core.packing import Prompts, TrainingSamples, plan_forest
from l2d_ray.models import causal_loss
from l2d_ray.models.causal_loss import packed_loss, padded_loss, runs_packed
from l2d_ray.models.trainable import prepare

PACKED = {
    "llama": {},
    "qwen3": {},
    "gpt2": {},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.0625},
    "gemma2": {"attn_logit_softcapping": None, "final_logit_softcapping": 3.0},
}
"""Families that run packed. In the last three the causal model's forward scales or caps the logits."""
PADDED = {
    "lfm2": {"layer_types": ["full_attention", "conv"]},
    "gemma2": {"attn_logit_softcapping": 0.5},
    "gpt_oss": {},  # attention sinks
    "bloom": {},  # does not call the replaceable attention function
    "mamba": {},
}


def samples(seed: int = 0, users: int = 3) -> TrainingSamples:
    """Make samples whose prompts share beginnings, with titles of one to four tokens. One sample is repeated."""
    random = np.random.default_rng(seed)
    sequences, lengths = [], []
    for _ in range(users):
        history = [random.integers(5, 30, random.integers(1, 5)).astype(np.int32) for _ in range(8)]
        for position in range(1, 8):
            suffix = np.array([40, 41], np.int32)
            sequences.append(np.concatenate([np.array([3], np.int32), *history[:position], suffix, history[position]]))
            lengths.append(history[position].size)
    sequences.append(sequences[0])
    lengths.append(lengths[0])
    return TrainingSamples(Prompts.join(sequences), np.array(lengths), np.arange(len(lengths)))


def one_by_one(batch: TrainingSamples) -> list[TrainingSamples]:
    rows = ((batch.sequences[n], batch.target_lengths[n : n + 1], batch.ids[n : n + 1]) for n in range(len(batch)))
    return [TrainingSamples(Prompts.join([sequence]), lengths, ids) for sequence, lengths, ids in rows]


def model_of(family: str, method: str, changes: dict[str, Any] | None = None, **settings: Any) -> Any:
    modules = ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"]
    finetune = FinetuneConfig(method=method, dropout=0, target_modules=modules, **settings)
    model = prepare(tiny_model(tiny_config(family, **changes or {})), finetune)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # LoRA's B starts at zero, which makes the gradient of A zero
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1, generator=generator)
    return model.eval()  # no dropout


def gradient(model: Any) -> torch.Tensor:
    parts = [weight.grad.flatten() for weight in model.parameters() if weight.requires_grad and weight.grad is not None]
    model.zero_grad()
    return torch.cat(parts)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", PACKED)
def test_the_packed_gradient_is_the_sum_of_the_samples_gradients(family: str, method: str) -> None:
    model, batch = model_of(family, method, PACKED[family]), samples()
    loss, counts = packed_loss(model, batch)
    loss.backward()
    packed = gradient(model)
    expected = 0.0
    for one in one_by_one(batch):
        part, _ = padded_loss(model, one)
        part.backward()
        expected += part.item()
    reference = gradient(model)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert (packed - reference).norm() / reference.norm() < 1e-4
    assert counts.distinct_tokens == plan_forest(batch.sequences).tokens.size < counts.tokens


@pytest.mark.parametrize(("family", "changes"), [*PACKED.items(), *PADDED.items()])
def test_a_samples_loss_is_the_mean_cross_entropy_of_its_title(family: str, changes: dict[str, Any]) -> None:
    """Compare with the loss that transformers computes, which is that mean."""
    model, batch = model_of(family, "full", changes), samples()
    expected = 0.0
    for one in one_by_one(batch):
        ids = torch.from_numpy(one.sequences[0].astype(np.int64))[None]
        labels = ids.clone()
        labels[0, : -one.target_lengths[0]] = -100
        expected += model(input_ids=ids, labels=labels).loss.item()
    loss, counts = padded_loss(model, batch)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert counts.distinct_tokens == counts.tokens == batch.sequences.tokens.size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "changes"), [*PACKED.items(), *PADDED.items()])
def test_runs_packed_finds_the_families_that_cannot(family: str, changes: dict[str, Any], dtype: str) -> None:
    model = model_of(family, "full", changes).to(getattr(torch, dtype))
    assert runs_packed(model, dtype) == (changes is PACKED.get(family))
    assert model.training


def test_chunked_logits_give_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, chunked = model_of("gemma2", "full", PACKED["gemma2"]), model_of("gemma2", "full", PACKED["gemma2"])
    loss, _ = packed_loss(whole, samples())
    loss.backward()
    monkeypatch.setattr(causal_loss, "LOGITS_PER_CHUNK", 7)
    in_chunks, _ = packed_loss(chunked, samples())
    in_chunks.backward()
    assert in_chunks.item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(gradient(chunked), gradient(whole), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("some_tokens", [False, True])
def test_the_librarys_chunks_give_the_same_gradient(
    monkeypatch: pytest.MonkeyPatch, method: str, some_tokens: bool
) -> None:
    """They run on GPUs only."""
    batch, vocabulary = samples(), torch.arange(2, 45) if some_tokens else None
    found = []
    for in_chunks in (causal_loss._loss_in_chunks, causal_loss.library_loss):
        model = model_of("llama", method)
        monkeypatch.setattr(causal_loss, "_loss_in_chunks", in_chunks)
        loss, _ = packed_loss(model, batch, vocabulary)
        loss.backward()
        found.append((loss.detach(), gradient(model)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_scaled_and_capped_logits_are_not_plain() -> None:
    for family, changes in PACKED.items():
        plain = family in ("llama", "qwen3", "gpt2")
        assert causal_loss.has_plain_logits(tiny_model(tiny_config(family, **changes))) == plain


@pytest.mark.parametrize("family", ["cohere", "gemma2", "llama"])
def test_the_loss_over_some_tokens_is_that_with_the_other_logits_at_minus_infinity(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed in chunks, and padded, with the gradient of every weight."""
    monkeypatch.setattr(causal_loss, "LOGITS_PER_CHUNK", 7)
    model, batch = model_of(family, "full", PACKED[family]), samples()
    vocabulary = torch.arange(3, 35)
    masked = model_of(family, "full", PACKED[family])
    outside = torch.ones(masked.config.vocab_size, dtype=torch.bool)
    outside[vocabulary] = False
    forward = causal_loss._logits

    def with_mask(*arguments: Any) -> torch.Tensor:
        return forward(*arguments).masked_fill(outside, -torch.inf)

    packed, _ = packed_loss(model, batch, vocabulary)
    packed.backward()
    ours = gradient(model)
    padded, _ = padded_loss(model, batch, vocabulary)
    with monkeypatch.context() as patch:
        patch.setattr(causal_loss, "_logits", with_mask)
        expected, _ = packed_loss(masked, batch)
        expected.backward()
    assert packed.item() == pytest.approx(expected.item(), rel=1e-5)
    assert padded.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(ours, gradient(masked), rtol=1e-4, atol=1e-6)
    assert packed.item() < packed_loss(model, batch)[0].item()


def test_gradient_checkpointing_gives_the_same_gradient() -> None:
    plain = model_of("llama", "lora")
    packed_loss(plain, samples())[0].backward()
    expected = gradient(plain)
    saving = model_of("llama", "lora", gradient_checkpointing=True)
    saving.train()  # transformers checkpoints in training only
    assert [m for m in saving.modules() if getattr(m, "gradient_checkpointing", False)]
    packed_loss(saving, samples())[0].backward()
    torch.testing.assert_close(gradient(saving), expected, rtol=1e-4, atol=1e-6)


def test_lora_trains_its_matrices_only_and_full_tuning_trains_every_weight() -> None:
    lora, full = model_of("llama", "lora"), model_of("llama", "full")
    assert {name.split(".")[-3] for name, w in lora.named_parameters() if w.requires_grad} == {"lora_A", "lora_B"}
    assert all(weight.requires_grad for weight in full.parameters())

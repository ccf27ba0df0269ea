"""The model to tune: LoRA matrices added by PEFT, or every weight; and what is left of it on the disk."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from l2d_ray.config import FinetuneConfig, ModelConfig
from l2d_ray.errors import InputError
from l2d_ray.models.backbone import load_causal_model, read_architecture
from l2d_ray.models.checkpoint import find_model


def load_trainable(model: ModelConfig, finetune: FinetuneConfig, dtype: str) -> Any:
    """The causal language model of `model`, on the CPU, prepared for training."""
    return prepare(load_causal_model(model, dtype), finetune)


def prepare(causal: Any, finetune: FinetuneConfig) -> Any:
    """The model with LoRA added, or as it is, in training mode; what `finetune` trains of it asks for gradients."""
    torch.manual_seed(finetune.seed)
    causal.config.use_cache = False
    if finetune.gradient_checkpointing:
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return (_with_lora(causal, finetune) if finetune.method == "lora" else causal).train()


def without_adapter(model: Any) -> Any:
    """The causal language model itself, with LoRA's matrices in its layers but without PEFT around it."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def save_trained(model: Any, state: dict[str, Tensor], tokenizer: Any, folder: Path) -> None:
    """Write the adapter (LoRA), or the whole model with its tokenizer, as safetensors.

    `state` holds the trained weights by their names in `model`. Raises InputError if they are not finite, or if LoRA's
    B matrices are missing or still the zeros that they began with.
    """
    check_trained(state, lora=hasattr(model, "peft_config"))
    model.save_pretrained(str(folder), state_dict=state, safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card, a form to fill in
    if not hasattr(model, "peft_config"):
        tokenizer.save_pretrained(str(folder))


def check_trained(state: dict[str, Tensor], lora: bool) -> None:
    """Raise InputError if these weights cannot be the result of a training."""
    for name, weight in state.items():
        if not weight.numel() or not torch.isfinite(weight).all():
            raise InputError(f"the tuned weights of {name} are empty or not finite; lower finetune.learning_rate")
    if lora:
        second = [weight for name, weight in state.items() if "lora_B" in name]
        if not second or not any(weight.any() for weight in second):
            raise InputError("the adapter came out empty: its lora_B matrices are missing or zero; nothing was learned")


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights that training changed, by name, on the CPU."""
    return {name: weight.detach().cpu().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def check_target_modules(model: ModelConfig, finetune: FinetuneConfig) -> None:
    """Raise InputError, naming what there is, if the model lacks a layer that LoRA shall add to. Loads no weights."""
    with torch.device("meta"):
        causal = transformers.AutoModelForCausalLM.from_config(read_architecture(find_model(model), model))
    kinds = (nn.Linear, Conv1D)
    linear = {name.rpartition(".")[2] for name, module in causal.named_modules() if isinstance(module, kinds)}
    unknown = [name for name in finetune.target_modules if name not in linear]
    if unknown:
        raise InputError(
            f"finetune.target_modules: the model has no linear layer {unknown[0]!r}; it has"
            f" {', '.join(sorted(linear - {'lm_head'}))}"
        )


def _with_lora(causal: Any, finetune: FinetuneConfig) -> Any:
    from peft import LoraConfig, get_peft_model  # takes seconds, and full tuning does without

    lora = LoraConfig(
        r=finetune.rank,
        lora_alpha=finetune.alpha,  # type: ignore[arg-type,unused-ignore]
        lora_dropout=finetune.dropout,
        target_modules=finetune.target_modules,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(causal, lora)

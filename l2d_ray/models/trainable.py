"""Models to fine-tune, by LoRA or in full: preparation, checks and saving."""

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
from l2d_ray.models.identity import resolve_dtype


def load_trainable(model: ModelConfig, finetune: FinetuneConfig, dtype: str) -> Any:
    """Load the causal language model that `model` names, on the CPU, prepared for training.

    Raises InputError as `load_causal_model` does.
    """
    return prepare(load_causal_model(model, dtype), finetune)


def load_trainable_body(model: ModelConfig, finetune: FinetuneConfig, device: str, num_layers: int) -> Any:
    """Load a model without its head, on the CPU, prepared for training on `device` on input vectors in place of tokens.

    Keeps at most its first `num_layers` layers. Leaves the process's random numbers as they were. Raises InputError as
    `check_target_modules` and `load_causal_model` do.
    """
    if finetune.method == "lora":
        check_target_modules(model, finetune)
    available = read_architecture(find_model(model), model).num_hidden_layers
    model = model.model_copy(update={"num_layers": min(num_layers, available)})
    dtype = resolve_dtype(model, device)
    with torch.random.fork_rng([]):
        body = without_adapter(prepare(load_causal_model(model, dtype, head=False), finetune)).base_model
    body.get_input_embeddings().requires_grad_(False)
    return body


def prepare(causal: Any, finetune: FinetuneConfig) -> Any:
    """Put a model into training mode, with LoRA added by PEFT if `finetune.method` is lora.

    Exactly the weights to train require gradients.
    """
    torch.manual_seed(finetune.seed)
    causal.config.use_cache = False
    if finetune.gradient_checkpointing:
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return (_with_lora(causal, finetune) if finetune.method == "lora" else causal).train()


def without_adapter(model: Any) -> Any:
    """Return the causal language model without the PEFT wrapper. LoRA's matrices stay in its layers."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def save_trained(model: Any, state: dict[str, Tensor], tokenizer: Any, folder: Path) -> None:
    """Write the adapter (LoRA), or the whole model with its tokenizer, as safetensors.

    `state` maps names in `model` to trained weights. Raises InputError if a weight is not finite, or if LoRA's B
    matrices are missing or still zero.
    """
    check_trained(state, lora=hasattr(model, "peft_config"))
    model.save_pretrained(str(folder), state_dict=state, safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)  # an empty model card that PEFT writes
    if not hasattr(model, "peft_config"):
        tokenizer.save_pretrained(str(folder))


def check_trained(state: dict[str, Tensor], lora: bool) -> None:
    """Raise InputError if a weight is empty or not finite, or with `lora` if the B matrices are missing or zero."""
    for name, weight in state.items():
        if not weight.numel() or not torch.isfinite(weight).all():
            raise InputError(f"fine-tuning: weights {name} are empty or not finite; lower finetune.learning_rate")
    if lora:
        b_matrices = [weight for name, weight in state.items() if "lora_B" in name]
        if not any(weight.any() for weight in b_matrices):
            raise InputError(
                "fine-tuning: the adapter came out empty, its lora_B matrices are missing or zero; raise"
                " finetune.learning_rate or finetune.epochs"
            )


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Copy the weights that require gradients to the CPU, by name."""
    return {name: weight.detach().cpu().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def check_target_modules(model: ModelConfig, finetune: FinetuneConfig) -> None:
    """Raise InputError if a name in `finetune.target_modules` is not a linear layer of the model. Loads no weights."""
    with torch.device("meta"):
        causal = transformers.AutoModelForCausalLM.from_config(read_architecture(find_model(model), model))
    kinds = (nn.Linear, Conv1D)
    linear = {name.rpartition(".")[2] for name, module in causal.named_modules() if isinstance(module, kinds)}
    unknown = [name for name in finetune.target_modules if name not in linear]
    if unknown:
        raise InputError(
            f"finetune.target_modules: the model has no linear layer {unknown[0]!r}; choose from"
            f" {', '.join(sorted(linear - {'lm_head'}))}"
        )


def _with_lora(causal: Any, finetune: FinetuneConfig) -> Any:
    from peft import LoraConfig, get_peft_model  # the import takes seconds, and full fine-tuning does not need it

    lora = LoraConfig(
        r=finetune.rank,
        lora_alpha=finetune.alpha,  # type: ignore[arg-type,unused-ignore]
        lora_dropout=finetune.dropout,
        target_modules=finetune.target_modules,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(causal, lora)

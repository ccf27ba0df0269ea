"""The DeepSpeed engine of a training worker: the model with its loss, optimizer and learning-rate schedule.

Names that DeepSpeed 0.19.8 does not document: `deepspeed.ops.__compatible_ops__`.
"""

from functools import partial
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from l2d_ray.config import FinetuneConfig
from l2d_ray.core.packing import TrainingSamples
from l2d_ray.models.causal_loss import LossCounts, packed_loss, padded_loss
from l2d_ray.stages.finetuning import Schedule, learning_rate_factor

# Otherwise DeepSpeed compiles C++ on every CPU worker at its start, to make sums within one machine faster.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Loss(nn.Module):
    """The loss as a module, because DeepSpeed prepares the weights that a module's forward needs."""

    vocabulary: Tensor | None

    def __init__(self, model: Any, packed: bool, vocabulary: Tensor | None) -> None:
        super().__init__()
        self.model, self._loss = model, packed_loss if packed else padded_loss
        self.register_buffer("vocabulary", vocabulary, persistent=False)

    def forward(self, samples: TrainingSamples) -> tuple[Tensor, LossCounts]:
        """Return what `packed_loss` or `padded_loss` returns."""
        return self._loss(self.model, samples, self.vocabulary)


def make_engine(
    model: Any, packed: bool, vocabulary: Tensor | None, finetune: FinetuneConfig, dtype: str, schedule: Schedule
) -> Any:
    """Return a DeepSpeed engine around the model, which runs packed or padded, with the loss over a vocabulary."""
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=finetune.learning_rate, weight_decay=finetune.weight_decay, fused=True)
    warmup = min(finetune.warmup_steps, schedule.steps // 10)
    factor = partial(learning_rate_factor, warmup=warmup, steps=schedule.steps)
    engine, *_ = deepspeed.initialize(
        model=Loss(model, packed, vocabulary),
        model_parameters=trainable,
        optimizer=optimizer,
        lr_scheduler=LambdaLR(optimizer, factor),
        config=engine_settings(finetune, dtype, schedule.micro_batches, schedule.workers),
        dist_init_required=False,
    )
    return engine


def engine_settings(finetune: FinetuneConfig, dtype: str, micro_batches: int, workers: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration."""
    zero: dict[str, Any] = {"stage": finetune.zero_stage}
    if finetune.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if finetune.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_batch_size": finetune.micro_batch_size * micro_batches * workers,
        "train_micro_batch_size_per_gpu": finetune.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": finetune.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }

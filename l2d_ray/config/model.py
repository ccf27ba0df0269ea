"""Settings of the language model: which one, how it is fine-tuned, and the workers that run it."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from l2d_ray.config.section import Model, Name, Section

_VALUE = r"[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?"
LabelKey = Annotated[str, Field(pattern=rf"^({_VALUE}/)?{_VALUE}$")]
"""The name of a label of Ray's nodes."""
LabelSelector = Annotated[str, Field(pattern=rf"^!?({_VALUE}|in\({_VALUE}(, ?{_VALUE})*\))$")]
"""A value of a label, or several; `!` excludes them."""


class ModelConfig(Section):
    """The language model whose last hidden state stands for a history."""

    name: Model = "demo"
    """Hub id, folder, URI or GGUF file of the model. `demo` is SmolLM2-135M-Instruct, downloaded and cached."""
    adapter: Model | None = None
    """Hub id, folder or URI of a PEFT adapter to merge into the model. null, given explicitly, takes model.name as it
    is even if the workspace holds a fine-tuned model."""
    num_layers: int | None = Field(None, ge=1)
    """Keep only this many of the model's first layers. null: all."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    """Number format the model computes in. auto: bfloat16 on a GPU, float32 on a CPU. On CPUs with AMX, bfloat16 is 2.8
    times as fast as float32 (jobs/RESULTS.md); without AVX-512 BF16 it is slower. int8 (8-bit weights, 16-bit inputs)
    is for CPUs with VNNI but no AMX, and cannot be fine-tuned. A memory and its queries need the same format."""


class FinetuneConfig(Section):
    """Fine-tuning. The defaults are published: BIGRec's LoRA, learning rate and batch, D3's epochs and warm-up.

    BIGRec is arXiv 2308.08434, D3 is arXiv 2406.14900.
    """

    method: Literal["lora", "full"] = "lora"
    """Weights to train. `lora` leaves a PEFT adapter (for model.adapter). `full` trains every weight of a small model
    and leaves a model folder (for model.name)."""
    rank: int = Field(8, ge=1)
    """LoRA rank."""
    alpha: float = Field(16, gt=0)
    """LoRA alpha: the update is scaled by alpha / rank."""
    dropout: float = Field(0.05, ge=0, lt=1)
    """LoRA dropout, as a share of the inputs."""
    target_modules: list[str] = Field(["q_proj", "v_proj"], min_length=1)
    """Names of the linear layers that LoRA adapts."""
    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate, at the end of the warm-up. A cosine then takes it to 0."""
    warmup_steps: int = Field(20, ge=0)
    """Optimizer steps of linear warm-up, at most a tenth of all steps."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of AdamW."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Clip gradients to this norm."""
    epochs: int = Field(3, ge=1)
    """Maximum number of passes over the training samples."""
    patience: int = Field(1, ge=1)
    """Stop after this many epochs without a better validation loss. The weights of the best epoch are kept."""
    batch_size: int = Field(128, ge=1)
    """Mean number of samples of one optimizer step, over all workers. A step ends where a window ends."""
    micro_batch_size: int = Field(64, ge=1)
    """Mean number of samples that a worker runs at once, at most. Some runs have two thirds more, to keep a window
    together. Gradients accumulate up to batch_size."""
    samples: int | None = Field(None, ge=1)
    """Approximate number of training samples to use. Samples that share a window's beginning are chosen together. null:
    all."""
    valid_samples: int = Field(1000, ge=1)
    """Approximate number of validation samples for the loss after each epoch."""
    vocabulary: Literal["catalogue", "all"] = "all"
    """Tokens that the loss chooses from: `all` of the model's, or those of the catalogue's titles. `catalogue` computes
    no other logits, which saves most of the output layer. Only recommenders that generate free text, such as gpt4rec,
    then write worse. The losses of the two cannot be compared."""
    gradient_checkpointing: bool = False
    """Recompute activations instead of keeping them: slower, but needs a fraction of the memory."""
    zero_stage: int = Field(0, ge=0, le=3)
    """DeepSpeed ZeRO stage. 1 shards the optimizer's state over the workers, 2 also the gradients, 3 also the weights.
    Every worker first loads the whole model, so that one GPU must hold it even with 3."""
    offload: bool = False
    """Keep the optimizer's state in CPU memory, with ZeRO 1 to 3; with 3 also the weights."""
    checkpoint_steps: int = Field(100, ge=1)
    """Optimizer steps between checkpoints."""
    checkpoint_minutes: float = Field(10, gt=0)
    """Minutes between checkpoints, if that is sooner."""
    keep_checkpoints: int = Field(2, ge=1)
    """Number of checkpoints to keep."""
    max_failures: int = Field(3, ge=0)
    """Number of lost workers to recover from, each time from the last checkpoint."""
    seed: int = Field(0, ge=0)
    """Seed of the sample order, the LoRA weights and the dropout."""
    trackers: list[Literal["tensorboard", "mlflow", "wandb"]] = Field(["tensorboard"])
    """Trackers that receive the metrics, in addition to the report. MLflow and Weights & Biases must be installed."""
    name: Name = "adapter"
    """Folder of the workspace for the result."""

    @field_validator("name")
    @classmethod
    def _check_folder(cls, name: str) -> str:
        if name in (
            "checkpoints",
            "dataset",
            "export",
            "fusions",
            "index",
            "memory",
            "recommenders",
            "reports",
            "serving",
        ):
            raise ValueError("another stage keeps its files in that folder; give another name")
        return name


class WorkersConfig(Section):
    """The worker processes that run the model."""

    min: int = Field(1, ge=1)
    """Minimum number of workers. Where a cluster has room for fewer, the job says so. Training waits for them, the
    other stages begin with the first."""
    max: int | None = Field(None, ge=1)
    """Maximum number of workers. null: as many as fit on this machine, or as a cluster can grow to. Training takes as
    many as fit when it starts; on a cluster without any, it asks for finetune.batch_size / finetune.micro_batch_size.
    The number of training workers does not change after the start."""
    wait_seconds: float = Field(600, ge=0)
    """Seconds for which training waits until a cluster has room for workers.max. It then starts with what is there, at
    least workers.min. A cloud's GPU node joins within 10 minutes, or is not to be had."""
    labels: dict[LabelKey, LabelSelector] = Field({})
    """Labels of the nodes that may run workers. Values are `{zone: a}`, `{zone: "!a"}` or `{zone: "in(a,b)"}`. On the
    command line: `workers.labels=ray.io/market-type=spot`. The driver is no worker: it runs on the head."""
    gpus: float = Field(0.0, ge=0)
    """GPUs of each worker. Workers with a fraction share one."""
    cpus: int = Field(1, ge=1)
    """CPUs, and threads, of each worker."""
    tokens_per_chunk: int | None = Field(None, ge=64)
    """Distinct tokens in one forward pass. null: 2,048 on a CPU, 16,384 on a GPU."""

    @property
    def resources(self) -> dict[str, float]:
        """Resources of one worker by Ray's names."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"workers.max={self.max} is below workers.min={self.min}; raise it or lower workers.min")
        return self

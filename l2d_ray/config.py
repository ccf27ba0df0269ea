"""The configuration: one typed tree with a default for every setting. `command_line.py` reads it."""

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)


class Section(BaseModel):
    """A part of the tree: immutable, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_not_one(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic would read `units: true` as 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation is not bool:
            raise ValueError("a boolean is not accepted here")
        return value


class ColumnsConfig(Section):
    """The names of the columns of `data.source: table`."""

    user: str = "user_id"
    """Column of the interactions that holds the user."""
    item: str = "item_id"
    """Column of the interactions, and of the items, that holds the item."""
    timestamp: str = "timestamp"
    """Column of the interactions that orders a user's history: whole numbers of any unit, or an Arrow timestamp.
    data.since and data.until take whole numbers for Unix seconds."""
    title: str = "title"
    """Column of the items that holds the title."""


class DataConfig(Section):
    """Raw interactions and items, and how they become samples."""

    source: str = "demo"
    """Format of the raw files, one of l2d_ray/data/sources.py: demo (MovieLens-100k, downloaded and cached), movielens,
    amazon, d3 (which keeps the published split of D3, arXiv 2406.14900), table."""
    interactions: str | None = None
    """File or folder of the raw interactions (d3: the folder with train/, valid/ and test/)."""
    items: str | None = None
    """File or folder of the raw items; movielens and d3 find theirs beside the interactions."""
    columns: ColumnsConfig = ColumnsConfig()
    min_interactions: int = Field(5, ge=1)
    """k of the k-core: users and items with fewer interactions are dropped, repeatedly, until none is left to drop."""
    max_title_words: int = Field(20, ge=1)
    """Items with a longer title are dropped (20 is D3's rule, arXiv 2406.14900)."""
    since: date | None = None
    """Interactions before this day (UTC) are dropped."""
    until: date | None = None
    """Interactions on this day (UTC) or later are dropped."""
    split: Literal["time", "leave-one-out"] = "time"
    """`time`: all samples by the time of their target, 8:1:1 (D3); `leave-one-out`: each user's last two."""
    num_blocks: int | None = Field(None, ge=1)
    """Parts the users are dealt into while preparing, each held in one worker's memory. None: one per 64 MB read."""
    max_users: int | None = Field(None, ge=1)
    """Keep only so many users, chosen by the hash of their id, after every filter: a quick look at large data."""

    @model_validator(mode="after")
    def _starts_before_it_ends(self) -> Self:
        if self.since and self.until and self.since >= self.until:
            raise ValueError(f"data.since={self.since} must be before data.until={self.until}")
        return self


class HistoryConfig(Section):
    """The window: which items of a history the model sees."""

    max_items: int = Field(10, ge=1)
    """The last so many items (the paper's 10)."""
    stride: int = Field(10, ge=1)
    """The window's left edge moves in steps of this many items, so that neighbouring samples share their beginning and
    histories are max_items to max_items + stride - 1 long. 1 is the paper's window; 10 runs several times fewer
    tokens (jobs/RESULTS.md)."""


class PromptConfig(Section):
    """The template. Its parts are tokenised separately and joined as token ids."""

    prefix: str = "The user watched or bought, in this order:\n"
    item: str = "{title}\n"
    """One item's form; it must contain {title} once."""
    suffix: str = ""
    """Without one, a title that fine-tuning predicts is at once the history of the next sample: fewer tokens, no less
    Recall (jobs/RESULTS.md)."""
    max_item_tokens: int = Field(32, ge=1)
    """Titles are cut to this many tokens."""

    @field_validator("item")
    @classmethod
    def _has_a_title(cls, item: str) -> str:
        if item.count("{title}") != 1:
            raise ValueError("the item form must contain {title} exactly once")
        return item


class ModelConfig(Section):
    """The language model whose last hidden state stands for a history."""

    name: str = "demo"
    """A hub id, a folder or its URI, or a GGUF file; `demo` is SmolLM2-135M-Instruct, downloaded and cached."""
    adapter: str | None = None
    """Folder, its URI, or hub id of a PEFT adapter, merged into the model."""
    num_layers: int | None = Field(None, ge=1)
    """Keep only the first so many layers."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU. On CPUs with AMX bfloat16 is 2.8 times as fast (jobs/RESULTS.md), on
    those without AVX-512 BF16 slower; int8 is for CPUs with VNNI but no AMX: 8-bit weights, inputs of 16 bits. A memory
    and what queries it need the same dtype; fine-tuning does not know int8."""


class FinetuneConfig(Section):
    """Fine-tuning, jobs/finetune.py. Defaults are published ones: LoRA, learning rate and batch of BIGRec (arXiv
    2308.08434), epochs and warm-up of D3 (arXiv 2406.14900)."""

    method: Literal["lora", "full"] = "lora"
    """`lora` leaves a PEFT adapter, for model.adapter; `full` tunes every weight of a small model and leaves a model
    folder, for model.name."""
    rank: int = Field(8, ge=1)
    """Of LoRA's matrices."""
    alpha: float = Field(16, gt=0)
    """LoRA's scale: alpha / rank."""
    dropout: float = Field(0.05, ge=0, lt=1)
    """Of LoRA's input."""
    target_modules: list[str] = Field(["q_proj", "v_proj"], min_length=1)
    """Names of the linear layers that LoRA adds to."""
    learning_rate: float = Field(1e-4, gt=0)
    """At the end of the warm-up; a cosine leads it to 0."""
    warmup_steps: int = Field(20, ge=0)
    """The learning rate grows over so many optimizer steps, at most a tenth of all."""
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    epochs: int = Field(3, ge=1)
    """Passes over the training samples, at most."""
    patience: int = Field(1, ge=1)
    """Stop after so many epochs without a better validation loss. The best epoch's weights are kept."""
    batch_size: int = Field(128, ge=1)
    """Samples of an optimizer step, over all workers."""
    micro_batch_size: int = Field(64, ge=1)
    """Samples that a worker runs at a time, at most; gradients accumulate up to batch_size."""
    samples: int | None = Field(None, ge=1)
    """About so many training samples at most; those that share a window's beginning are chosen together. None: all."""
    valid_samples: int = Field(1000, ge=1)
    """About so many validation samples at most, for the loss after each epoch."""
    gradient_checkpointing: bool = False
    """Compute activations again instead of keeping them: slower, in a fraction of the memory."""
    zero_stage: int = Field(0, ge=0, le=3)
    """DeepSpeed ZeRO: 1 shards the optimizer's state over the workers, 2 also gradients, 3 also weights. Every worker
    first loads the whole model, which must fit its GPU even with 3."""
    offload: bool = False
    """ZeRO 1 to 3: keep the optimizer's state (3: and the weights) in the CPU's memory."""
    checkpoint_steps: int = Field(100, ge=1)
    """Leave a checkpoint after so many optimizer steps."""
    checkpoint_minutes: float = Field(10, gt=0)
    """Or after so many minutes, whichever comes first."""
    keep_checkpoints: int = Field(2, ge=1)
    """The last so many are kept."""
    max_failures: int = Field(3, ge=0)
    """Go on from the last checkpoint after at most so many lost workers."""
    seed: int = Field(0, ge=0)
    """Of the order of samples, LoRA's start and dropout."""
    trackers: list[Literal["tensorboard", "mlflow", "wandb"]] = ["tensorboard"]
    """Where metrics go, besides the report; MLflow and Weights & Biases must be installed."""
    name: str = Field("adapter", pattern=r"^\w[\w.-]*$")
    """Folder of the workspace that the result goes to."""

    @field_validator("name")
    @classmethod
    def _is_no_other_folder(cls, name: str) -> str:
        if name in ("checkpoints", "dataset", "index", "memory", "reports", "serving"):
            raise ValueError("another stage keeps its files in that folder; take another name")
        return name


class MemoryConfig(Section):
    """The store of hidden states."""

    num_shards: int = Field(4, ge=1)
    """All rows of an item live in shard hash(item) mod num_shards."""
    units: int | None = Field(None, ge=1)
    """Slices of the histories that are committed one by one. None: one per 100,000 samples but at least 64, so that a
    crash loses little and a cluster has enough to deal out."""
    sample_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the training samples to keep: 0.3 is a subset of 0.5. Samples that share a window's beginning are kept
    together, so that a share of the samples costs the same share of the tokens."""


class IndexConfig(Section):
    """The index of a memory, jobs/build_index.py."""

    snapshot: int | None = Field(None, ge=1)
    """Which snapshot of the memory. None: the newest."""
    space: Literal["none", "centre", "whiten-total", "whiten-within"] = "whiten-within"
    """Where distances are taken (core/space.py): `none` is plain L2, the paper's; `whiten-within` divides by the
    covariance inside items, with which L2D-G finds most of all (jobs/RESULTS.md)."""
    shrinkage: float = Field(0.01, ge=0, le=1)
    """Of the covariance, towards a multiple of the identity."""
    prior: float | None = Field(None, ge=0)
    """Weight of an item's log-frequency in L2D-G: -1/2 distance^2 + prior * log(rows of the item). None: 2 in the space
    whiten-within, where 1 would be that of linear discriminant analysis, and validation data prefer more
    (jobs/RESULTS.md), else 0."""
    factory: str = "auto"
    """A FAISS factory string for the rows of a shard (Flat, SQfp16, HNSW32, "IVF4096,PQ64", …). auto: exact up to
    100,000 rows in a shard, then inverted lists, compressed above 5,000,000."""
    target_recall: float = Field(0.995, gt=0, le=1)
    """An approximate index searches as widely as it takes to find this share of the exact top K, with M up to 1,000."""
    sample_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the memory's rows to index, chosen by sample id: 0.3 is a subset of 0.5."""

    def prior_in(self, space: str) -> float:
        """The weight in force in this space."""
        if self.prior is None:
            return 2.0 if space == "whiten-within" else 0.0
        return self.prior


class RecommendConfig(Section):
    """How L2D recommends."""

    top_m: int = Field(200, ge=1)
    """M: L2D-L averages the so many rows nearest to a history. jobs/evaluate.py chooses it on validation data."""
    exclude_seen: bool = True
    """Never recommend what is in the history."""


class EvaluateConfig(Section):
    """The evaluation, jobs/evaluate.py."""

    recommenders: list[str] = Field(
        [
            "most-popular",
            "co-occurrence",
            "l2d-global-none",
            "l2d-local-none",
            "l2d-global",
            "l2d-local",
            "constrained-beam-20",
            "grounded-beam",
        ],
        min_length=1,
    )
    """Which to compare: `-none` (or another space) is instead of index.space, `+prior` the best prior of
    evaluate.priors, and a number that of beams."""
    samples: int = Field(10_000, ge=1)
    """Test samples at most, and as many validation samples; chosen by sample id."""
    generation_samples: int = Field(200, ge=1)
    """Test samples for those that generate text, which takes seconds each; the others are compared on these, too."""
    generation_batch_size: int = Field(8, ge=1)
    """Prompts that beam search continues side by side."""
    top_m: list[Annotated[int, Field(ge=1)]] = Field([20, 50, 100, 200, 500, 1000], min_length=1)
    """Values of recommend.top_m tried on validation data."""
    priors: list[Annotated[float, Field(ge=0)]] = Field([0.0, 1.0, 2.0, 3.0, 4.0], min_length=1)
    """Values of index.prior tried on validation data, for `+prior`."""
    fractions: list[Annotated[float, Field(gt=0, le=1)]] = [0.1, 0.3, 1.0]
    """Shares of the memory for Recall against memory size (the paper's 30% study)."""
    batch_size: int = Field(64, ge=1)
    """Samples that are encoded and recommended together."""
    name: str = Field("evaluation", pattern=r"^[\w.-]+$")
    """Of the report's files in reports/."""


class WorkersConfig(Section):
    """The actors that run the model."""

    min: int = Field(1, ge=1)
    """Workers at least. The pool starts with as many as fit, and grows as nodes join and work waits."""
    max: int | None = Field(None, ge=1)
    """Workers at most. None: as many as fit; on a cluster of several nodes, as many as it grows to hold, but for
    training, whose number of workers is that of its start."""
    gpus: float = Field(0.0, ge=0)
    """GPUs for each worker; fractions share one."""
    cpus: int = Field(1, ge=1)
    """CPUs for each worker; also its number of threads."""
    tokens_per_chunk: int | None = Field(None, ge=64)
    """Distinct tokens in one forward pass. None: 2,048 on a CPU, 16,384 on a GPU."""

    @model_validator(mode="after")
    def _max_is_not_below_min(self) -> Self:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"workers.max={self.max} is below workers.min={self.min}")
        return self


class ServeConfig(Section):
    """The HTTP endpoint, jobs/serve.py and cluster/serve.yaml."""

    host: str = "127.0.0.1"
    """Address to listen on. Beyond this machine (0.0.0.0) only with keys. Of jobs/serve.py; with `serve deploy`, the
    YAML's http_options say it. Ray's own ports, between its processes, are Ray's to guard (its token, its TLS)."""
    port: int = Field(8000, ge=1, le=65_535)
    gateways: int = Field(1, ge=1)
    """Replicas of what speaks HTTP. With two, one may die without a user noticing; with one, serve.max_waiting requests
    wait for its successor on the head node, however long it takes."""
    encoders: int = Field(1, ge=1)
    """Replicas of the model, each with workers.cpus and workers.gpus. With two, one may die without a user noticing,
    or hang: who is sent to it is answered by the other one after four tenths of serve.deadline_seconds, until it is
    replaced, within a minute and a half."""
    cache_megabytes: float = Field(1024, ge=0)
    """For keys and values of recent histories in each encoder, so that of a user who returns only the new items run;
    twice, while a promotion has it hold two models. A history takes tokens x layers x 2 x the size of a key
    (SmolLM2-135M: 46 KB a token, Llama-3.2-1B: 33 KB)."""
    shard_replicas: int = Field(1, ge=1)
    """Replicas of each shard of the index. With two, one may die without a user noticing."""
    shard_megabytes: float = Field(256, gt=0)
    """Shards of the index share processes of about this size: to ask one more process costs milliseconds, to search
    more megabytes in one as well."""
    partial: bool = False
    """Answer from the shards that are there, marked as partial, where one is away; else 503."""
    deadline_seconds: float = Field(10, gt=0)
    """A request that takes longer is answered with 504."""
    shard_seconds: float = Field(3, gt=0)
    """A shard that does not answer for so long counts as away. With serve.shard_replicas, another one is asked beside
    it after a third of that, unless many questions are on their way already."""
    max_waiting: int = Field(200, ge=1)
    """Requests that may wait in an encoder, as many in a gateway for a place there, and as many for a gateway where
    there is none. The next ones, and those that could not be done within the deadline for what waits already, are
    answered with 503 and Retry-After."""
    max_k: int = Field(100, ge=20, le=10_000)
    """Items of an answer; a request that does not say asks for 20."""
    max_history: int = Field(1000, ge=1)
    """Items of a history."""
    max_title_chars: int = Field(500, ge=1)
    """Of a title in a history, or a query for titles."""
    max_filter_items: int = Field(10_000, ge=1)
    """Item ids in `deny` or `allow`."""
    max_batch: int = Field(64, ge=1)
    """Requests in one batch request."""
    max_body_bytes: int = Field(1 << 20, ge=1)
    keys_file: str | None = None
    """File with the keys that clients may use as bearer tokens, one a line; what it holds counts at once. More keys,
    parted by commas, may come in the environment variable L2D_RAY_KEYS. Without keys anybody who reaches the port may
    ask."""
    beams: int | None = Field(None, ge=2)
    """Also offer constrained beam search with so many beams, at /v1/beam_search and on the page, to compare with: a
    model of its own, and seconds a request. None: do not."""
    beam_seconds: float = Field(120, gt=0)
    """The deadline of that."""
    log_histories: bool = False
    """Write each answered request and its response to the gateways' logs: to Ray Serve's JSON files, and to stderr."""
    cors_origins: list[str] = []
    """Web origins that may ask from a browser, besides the page itself. It shows their scripts no answer that is not an
    application's, such as a 503 while the gateways are away: to them the endpoint cannot be reached then."""

    @model_validator(mode="after")
    def _a_batch_may_wait(self) -> Self:
        if self.max_waiting < self.max_batch:
            raise ValueError(
                f"serve.max_waiting={self.max_waiting} is below serve.max_batch={self.max_batch}: a full batch would be"
                " refused always"
            )
        return self


class BenchConfig(Section):
    """The benchmarks, jobs/bench_*.py."""

    samples: int = Field(400, ge=1)
    """Samples to run."""
    repeats: int = Field(3, ge=1)
    """Runs of each way, alternating."""
    threads: int | None = Field(None, ge=1)
    """CPU threads. None: those of one worker (workers.cpus)."""
    seconds: int = Field(20, ge=1)
    """Of each load that jobs/bench_serve.py puts on the endpoint."""
    rows: list[Annotated[int, Field(ge=1000)]] = Field([100_000, 1_000_000], min_length=1)
    """Sizes of the made-up memories of jobs/bench_search.py."""
    shards: list[Annotated[int, Field(ge=1)]] = Field([1, 4], min_length=1)
    """In how many parts each is indexed."""
    dimension: int = Field(576, ge=8)
    """Of their rows."""
    factories: list[str] = Field(["Flat", "HNSW32", "IVF,SQfp16", "IVF_HNSW32,PQ"], min_length=1)
    """FAISS factory strings; IVF and PQ without numbers are sized by the rows and the dimension."""


class Config(BaseSettings):
    """Every setting of every stage; see the sections."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    workspace: str = "workspace"
    """Folder or URI (s3://…, gs://…: whatever pyarrow.fs opens) that holds everything the stages leave behind."""
    data: DataConfig = DataConfig()
    history: HistoryConfig = HistoryConfig()
    prompt: PromptConfig = PromptConfig()
    model: ModelConfig = ModelConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    memory: MemoryConfig = MemoryConfig()
    index: IndexConfig = IndexConfig()
    recommend: RecommendConfig = RecommendConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    workers: WorkersConfig = WorkersConfig()
    serve: ServeConfig = ServeConfig()
    bench: BenchConfig = BenchConfig()

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Where the model runs: on a GPU if each worker has one, or a part of one."""
        return "cuda" if self.workers.gpus > 0 else "cpu"

    def replace(self, changes: dict[str, Any]) -> Self:
        """Return the same configuration with other values of some dotted keys: `replace({"index.snapshot": 3})`.

        Raises pydantic's ValidationError for an unknown key or an impossible value, as for a new configuration.
        """
        tree = self.model_dump()
        for key, value in changes.items():
            *sections, name = key.split(".")
            section = tree
            for part in sections:
                section = section.setdefault(part, {})
            section[name] = value
        return type(self)(**tree)

    def absolute(self) -> "Config":
        """The same with this process's relative paths made absolute: other processes have another working folder."""
        model, serve = self.model.model_dump(), self.serve
        for key in ("name", "adapter"):
            if model[key] and Path(model[key]).expanduser().exists():
                model[key] = str(Path(model[key]).expanduser().resolve())
        if serve.keys_file:  # whose links may be turned while it is served
            serve = serve.model_copy(update={"keys_file": str(Path(serve.keys_file).expanduser().absolute())})
        workspace = self.workspace
        if "://" not in workspace:
            workspace = str(Path(workspace).expanduser().resolve())
        return self.model_copy(update={"workspace": workspace, "model": ModelConfig(**model), "serve": serve})

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is passed in: no environment variables, no dotenv files."""
        return (init_settings,)

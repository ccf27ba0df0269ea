"""The whole configuration."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from l2d_ray.config.capacity import CapacityConfig
from l2d_ray.config.data import DataConfig, HistoryConfig, PromptConfig
from l2d_ray.config.evaluation import BenchConfig, CompareConfig, EvaluateConfig, ExportConfig
from l2d_ray.config.memory import IndexConfig, MemoryConfig, RecommendConfig
from l2d_ray.config.model import FinetuneConfig, ModelConfig, WorkersConfig
from l2d_ray.config.retention import CompactConfig, EraseConfig
from l2d_ray.config.section import Folder
from l2d_ray.config.serving import ServeConfig
from l2d_ray.config.training import TrainConfig, TuneConfig


class Config(BaseModel):
    """Every setting of every stage. Paths are absolute, because other processes have another working folder."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    workspace: Folder = Field("workspace", validate_default=True)
    """Folder or URI for everything the stages leave behind. A URI is s3://bucket/folder or gs://bucket/folder. Options
    follow a question mark: region, endpoint_override, scheme, anonymous, connect_timeout, request_timeout, retries."""
    recommender: str = "sasrec"
    """Recommender that jobs/train.py trains: sasrec, esasrec, gru4rec, alpharec, id-head or lite-llm4rec. `sasrec-NAME`
    is another one of the kind, to keep next to it. jobs/evaluate.py takes the same names."""
    data: DataConfig = DataConfig()
    history: HistoryConfig = HistoryConfig()
    prompt: PromptConfig = PromptConfig()
    model: ModelConfig = ModelConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    memory: MemoryConfig = MemoryConfig()
    erase: EraseConfig = EraseConfig()
    compact: CompactConfig = CompactConfig()
    index: IndexConfig = IndexConfig()
    recommend: RecommendConfig = RecommendConfig()
    train: TrainConfig = TrainConfig()
    tune: TuneConfig = TuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    compare: CompareConfig = CompareConfig()
    export: ExportConfig = ExportConfig()
    workers: WorkersConfig = WorkersConfig()
    serve: ServeConfig = ServeConfig()
    bench: BenchConfig = BenchConfig()
    capacity: CapacityConfig = CapacityConfig()

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Device of the model: a GPU if each worker has one, or a part of one."""
        return "cuda" if self.workers.gpus > 0 else "cpu"

    def given(self) -> dict[str, Any]:
        """Return the settings that were given, as JSON values by dotted key. All others have their defaults."""
        return flatten(self.model_dump(mode="json", exclude_unset=True))

    def replace(self, changes: dict[str, Any]) -> Self:
        """Return the same configuration with other values of some dotted keys: `replace({"index.snapshot": 3})`.

        The changed settings count as given. Raises pydantic's ValidationError for an unknown key or an impossible
        value, as for a new configuration.
        """
        tree = self.model_dump(exclude_unset=True)
        for key, value in changes.items():
            *sections, name = key.split(".")
            section = tree
            for part in sections:
                section = section.setdefault(part, {})
            section[name] = value
        return type(self)(**tree)


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in flatten(value).items()}
        else:
            flat[name] = value
    return flat

"""The configuration: one typed tree with a default for every setting.

`Config` is the whole tree; each of its sections is a class that the part of the package that reads it takes alone.
`l2d_ray.command_line` reads the tree from a YAML file and the command line.
"""

from l2d_ray.config.capacity import CapacityConfig
from l2d_ray.config.data import ColumnsConfig, DataConfig, HistoryConfig, PromptConfig
from l2d_ray.config.evaluation import BenchConfig, CompareConfig, EvaluateConfig, ExportConfig
from l2d_ray.config.memory import IndexConfig, MemoryConfig, RecommendConfig
from l2d_ray.config.model import FinetuneConfig, ModelConfig, WorkersConfig
from l2d_ray.config.retention import CompactConfig, EraseConfig
from l2d_ray.config.section import Section
from l2d_ray.config.serving import ServeConfig
from l2d_ray.config.training import TrainConfig, TuneConfig
from l2d_ray.config.tree import Config, flatten

__all__ = [
    "BenchConfig",
    "CapacityConfig",
    "ColumnsConfig",
    "CompactConfig",
    "CompareConfig",
    "Config",
    "DataConfig",
    "EraseConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FinetuneConfig",
    "HistoryConfig",
    "IndexConfig",
    "MemoryConfig",
    "ModelConfig",
    "PromptConfig",
    "RecommendConfig",
    "Section",
    "ServeConfig",
    "TrainConfig",
    "TuneConfig",
    "WorkersConfig",
    "flatten",
]

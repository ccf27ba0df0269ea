"""A dataset of given histories, and recommenders that are trained on it in seconds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from l2d_ray.command_line import load_config
from l2d_ray.config import Config
from l2d_ray.data.dataset import Dataset, write_manifest, write_part
from l2d_ray.recommenders.contract import Recommender
from l2d_ray.recommenders.registry import find
from l2d_ray.recommenders.resources import Resources
from l2d_ray.recommenders.trained import TrainingRecord
from l2d_ray.schema import HISTORIES, ITEMS, Split
from l2d_ray.stages.training import Report, plan_training, train
from l2d_ray.workspace import Workspace

LEAVE_ONE_OUT = (Split.VALID, Split.TEST)


def write_sequences(
    folder: Path, histories: Sequence[Sequence[int]], num_items: int, last: Sequence[Split] = LEAVE_ONE_OUT
) -> Dataset:
    """Write histories whose last samples are of the splits `last`, and all others for training."""
    rows = [
        {
            "user_id": f"u{user}",
            "user_hash": user * 1_000_003,
            "item_indices": list(items),
            "timestamps": list(range(len(items))),
            "splits": [Split.NONE, *[Split.TRAIN] * (len(items) - 1 - len(last)), *last],
        }
        for user, items in enumerate(histories)
    ]
    items = [{"item_index": i, "item_id": f"i{i}", "title": f"Title {i}"} for i in range(num_items)]
    workspace = Workspace.open(str(folder))
    parts = [write_part(workspace, 0, pa.Table.from_pylist(rows, schema=HISTORIES))]
    write_manifest(workspace, pa.Table.from_pylist(items, schema=ITEMS), parts, {})
    return Dataset.open(workspace)


def cycles(users: int, length: int, num_items: int) -> list[list[int]]:
    """Return histories in which item i + 1 follows item i, and the first one follows the last."""
    return [[(user + place) % num_items for place in range(length)] for user in range(users)]


def config_of(folder: Path, recommender: str = "sasrec", **settings: Any) -> Config:
    """Return a configuration; `settings` are those of `train`."""
    given = [f"train.{name}={value}" for name, value in settings.items()]
    return load_config([f"workspace={folder}", f"recommender={recommender}", *given])


def trained(config: Config, report: Report = lambda _: None) -> TrainingRecord:
    """Train a recommender."""
    return train(plan_training(config), report)


def loaded(config: Config) -> Recommender:
    """Load a trained recommender."""
    named = find(config.recommender, config, "recommender")
    return named.make(Resources(config, named.needs, {}))

"""The comparison: every stage that the named recommenders need, one evaluation of all, and its tables in Markdown.

A stage whose result is in the workspace is not run again, so that the same command goes on where it was killed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from l2d_ray.config import Config
from l2d_ray.data.dataset import MANIFEST, Dataset
from l2d_ray.distributed.build_index import build_index
from l2d_ray.distributed.build_memory import build_memory
from l2d_ray.distributed.evaluate import measure
from l2d_ray.distributed.pipeline import Titles, describe
from l2d_ray.distributed.prepare import prepare
from l2d_ray.distributed.screen import show
from l2d_ray.distributed.train import train
from l2d_ray.distributed.training.driver import finetune
from l2d_ray.distributed.tune import tune
from l2d_ray.recommenders.contract import Need
from l2d_ray.recommenders.registry import NamedRecommender, find
from l2d_ray.recommenders.trained import TrainingRecord, record_of
from l2d_ray.stages.allowances import SEED
from l2d_ray.stages.checks import finetuning_is_due
from l2d_ray.stages.comparison import document, names_by_seed, short_table
from l2d_ray.stages.findings import Report
from l2d_ray.stages.reports import plot_costs, png
from l2d_ray.stages.settings import check_data
from l2d_ray.workspace import Workspace


@dataclass(frozen=True)
class CompareResult:
    """The comparison, and where its tables are."""

    recall_at_20: dict[str, float]
    """By recommender."""
    ratios: list[dict[str, Any]]
    """Recall@20 of the reference over that of each other recommender, with its interval, and whether it is above 1."""
    tables: str
    """Location of the tables, in Markdown."""
    figure: str
    """Location of the plot of Recall@20 against seconds a user."""
    report: str
    """Location of the JSON report."""
    seconds: float


def compare(config: Config) -> CompareResult:
    """Run what `evaluate.recommenders` need, evaluate them, and write `reports/<evaluate.name>.md`.

    Raises InputError as the stages do.
    """
    steps = list(_steps(config))
    titles = Titles(len(steps) + 1)
    for title, step in steps:
        titles.show(title)
        step()
    titles.show("evaluate: all recommenders on the same test samples")
    names = [name for one in config.evaluate.recommenders for name in names_by_seed(one, config)]
    found, location = measure(config.replace({"evaluate.recommenders": list(dict.fromkeys(names))}))
    tables, figure = _write(found)
    show(f"\n{short_table(found)}")
    return CompareResult(
        recall_at_20={row.recommender: row.metrics.means["recall@20"] for row in found.results},
        ratios=[ratio.to_json() for ratio in found.ratios],
        tables=tables,
        figure=figure,
        report=location,
        seconds=titles.seconds,
    )


def _steps(config: Config) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the title of each stage before the evaluation, and the stage."""
    recommenders = [find(name, config, "evaluate.recommenders") for name in dict.fromkeys(config.evaluate.recommenders)]
    yield "prepare_data: histories of users, and their split", partial(_prepare, config)
    if finetuning_is_due(config, recommenders):
        yield "finetune: the language model, on the training samples", partial(finetune, config)
    if any(Need.INDEX in one.needs for one in recommenders):
        yield "build_memory: the hidden state of every training sample", partial(build_memory, config)
        yield "build_index: FAISS shards, item means and the space", partial(build_index, config)
    parts = [part.name for one in recommenders for part in one.options.parts]
    names = dict.fromkeys([*(one.name for one in recommenders), *(SEED.sub("", name) for name in parts)])
    for one in (find(name, config, "evaluate.recommenders") for name in names):
        if one.declaration.trainer:
            yield f"train {', '.join(names_by_seed(one.name, config))}", partial(_train, config, one)


def _prepare(config: Config) -> None:
    """Prepare the dataset unless the workspace has one. Raises InputError if that has other given settings."""
    workspace = Workspace.open(config.workspace)
    if not workspace.exists(MANIFEST):
        prepare(config)
    dataset = Dataset.open(workspace)
    check_data(config, dataset)
    describe(dataset)


def _train(config: Config, one: NamedRecommender) -> None:
    """Train a recommender with each seed, all with the settings of the first training.

    These are the settings of a training that is there, else those that a search finds if `compare.tune` asks for one.
    """
    workspace, path, trainer = Workspace.open(config.workspace), record_of(one.name), one.declaration.trainer
    first = config.replace({"recommender": one.name})
    if workspace.exists(path):
        recorded = TrainingRecord.read(workspace, path).settings
        first = first.replace({key: value for key, value in recorded.items() if key not in config.given()})
    else:
        first = first.replace({"train.seed": config.compare.seeds[0]})
        if config.compare.tune and trainer and trainer.grid:
            first = first.replace({f"train.{key}": value for key, value in tune(first).best.items()})
    train(first)
    settings = TrainingRecord.read(workspace, path).settings
    for name, seed in list(names_by_seed(one.name, config).items())[1:]:
        train(first.replace({**settings, "recommender": name, "train.seed": seed}))


def _write(found: Report) -> tuple[str, str]:
    """Write the tables and the plot, and return their locations."""
    config = found.plan.config
    workspace, name = Workspace.open(config.workspace), config.evaluate.name
    tables, figure = f"reports/{name}.md", f"reports/{name}-costs.png"
    with workspace.create(figure) as stream:
        stream.write(png(plot_costs(found)))
    with workspace.create(tables) as stream:
        stream.write(document(found, f"{name}-costs.png").encode())
    return workspace.path(tables), workspace.path(figure)

"""The main job: histories to a memory of hidden states, with Ray Data.

The driver deals out units of users (`extraction.plan_units`); a pool of actors builds them, each with the model loaded
once, and commits every unit as it is finished. Ray Data grows the pool with the work, restarts actors that die and
moves their unit elsewhere. What survives a crash of anything, the driver included, are the committed units: the same
command again builds the rest.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError

from l2d_ray.config import Config
from l2d_ray.data.dataset import Dataset
from l2d_ray.distributed.progress import Progress
from l2d_ray.distributed.workers import actor_pool
from l2d_ray.encoding import identify_memory
from l2d_ray.memory.manifest import UnitRecord
from l2d_ray.memory.store import MemoryStore
from l2d_ray.records import MemoryIdentity
from l2d_ray.stages.extraction import Unit, UnitExtractor, plan_units
from l2d_ray.stages.settings import check_data, for_memory, record_memory
from l2d_ray.workspace import Workspace

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildResult:
    """The snapshot that was built; counts are of the whole of it, times of this run."""

    samples: int
    """Training samples looked at: rows and quarantined."""
    rows: int
    quarantined: int
    tokens: int
    """Tokens that went through the model."""
    tokens_one_by_one: int
    """Tokens that would have, one sample at a time."""
    units: int
    units_reused: int
    """Units that an earlier run had committed."""
    seconds: float
    samples_per_second: float
    """Samples of this run alone, by its whole duration."""
    snapshot: int
    memory: str
    """Where the memory is."""


def build_memory(config: Config) -> BuildResult:
    """Build, or finish building, the memory that `config` describes, and record it as a snapshot.

    Raises InputError if there is no dataset or model, or if the workspace holds a memory made in another way.
    """
    started = time.monotonic()
    workspace = Workspace.open(config.workspace)
    config = for_memory(config)
    store = MemoryStore(workspace)
    dataset = Dataset.open(workspace)
    check_data(config, dataset)
    identity = identify_memory(config)
    known = store.accept(identity)
    record_memory(config, identity.dtype)
    units = plan_units(config, dataset)
    missing = [unit for unit in units if unit.name not in known]
    built = list(_progress(_build(config, identity, missing), len(missing)))
    records = [*(known[unit.name] for unit in units if unit.name in known), *built]
    names = [unit.name for unit in units]
    store.keep_items(dataset.digest, dataset.items())
    snapshot = store.take_snapshot(names, dataset.digest, config.memory.sample_fraction)
    store.remove_strays(names)
    if any(record.tokens == record.tokens_one_by_one > 10_000 for record in built):
        logger.warning("this model's attention cannot run packed: every prompt ran in full")
    seconds = time.monotonic() - started
    return BuildResult(
        samples=snapshot.rows + snapshot.quarantined,
        rows=snapshot.rows,
        quarantined=snapshot.quarantined,
        tokens=sum(record.tokens for record in records),
        tokens_one_by_one=sum(record.tokens_one_by_one for record in records),
        units=len(units),
        units_reused=len(units) - len(missing),
        seconds=round(seconds, 3),
        samples_per_second=round(sum(record.rows + record.quarantined for record in built) / seconds, 3),
        snapshot=snapshot.number,
        memory=workspace.path("memory"),
    )


class UnitActor:
    """A UnitExtractor where Ray Data can call it: one unit in, its record out."""

    def __init__(self, config: dict[str, Any], identity: dict[str, Any]) -> None:
        """Load the model. The arguments are plain so that a worker can read them whatever it has imported."""
        settings = Config(**config)
        torch.set_num_threads(settings.workers.cpus)
        self._extractor = UnitExtractor(settings, MemoryIdentity(**identity))

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        """Build the one unit of a batch of one."""
        unit = Unit(str(rows["name"][0]), int(rows["start"][0]), int(rows["stop"][0]))
        return {"record": [self._extractor.build(unit).model_dump_json()]}


def _build(config: Config, identity: MemoryIdentity, units: list[Unit]) -> Iterator[UnitRecord]:
    """The records of these units, in the order in which they are finished.

    When a node goes, Ray Data may give up on a task that it cannot know the end of. The units that were left are then
    begun again, as long as every round finishes some: a unit that kills all its workers must end the job.
    """
    missing = {unit.name: unit for unit in units}
    while missing:
        before = len(missing)
        try:
            for record in _run(config, identity, list(missing.values())):
                del missing[record.unit]
                yield record
        except RayActorError as error:
            if len(missing) == before:
                raise
            logger.warning("a worker was lost, going on with the %d units left: %s", len(missing), error)


def _run(config: Config, identity: MemoryIdentity, units: list[Unit]) -> Iterator[UnitRecord]:
    """One pass of Ray Data over these units."""
    workers = config.workers
    records = ray.data.from_items([asdict(unit) for unit in units], override_num_blocks=len(units)).map_batches(
        UnitActor,
        batch_size=1,
        compute=actor_pool(config, len(units)),
        num_cpus=workers.cpus,
        num_gpus=workers.gpus,
        max_task_retries=3,
        fn_constructor_args=(config.model_dump(mode="json"), identity.model_dump()),
    )
    for row in records.iter_rows():
        yield UnitRecord.model_validate_json(row["record"])


def _progress(records: Iterator[UnitRecord], total: int) -> Iterator[UnitRecord]:
    """Show units, samples and tokens a second, and the time left, on stderr."""
    started, samples, tokens = time.monotonic(), 0, 0
    with Progress(total, "building the memory", "units") as bar:
        for record in records:
            samples, tokens = samples + record.rows + record.quarantined, tokens + record.tokens
            seconds = time.monotonic() - started
            bar.advance(note=f"{samples / seconds:.1f} samples/s, {tokens / seconds:.0f} tokens/s")
            yield record

"""The main job: histories to a memory of hidden states, with Ray Data.

The driver divides the users into units (`extraction.plan_units`). Each actor of a pool loads the model once, builds
units, and commits each unit when it is complete. Ray Data grows the pool with the work, restarts actors that die, and
moves their units elsewhere. Committed units survive any crash, also that of the driver: the same command then builds
the rest.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import ray

from l2d_ray.config import Config
from l2d_ray.data.dataset import Dataset
from l2d_ray.distributed.progress import Progress
from l2d_ray.distributed.rounds import in_rounds
from l2d_ray.distributed.screen import say
from l2d_ray.distributed.workers import actor_pool, check_room, worker_options
from l2d_ray.encoding import identify_memory
from l2d_ray.memory.manifest import UnitRecord
from l2d_ray.memory.store import MemoryStore
from l2d_ray.records import MemoryIdentity
from l2d_ray.stages.extraction import Unit, UnitExtractor, held_out_store, plan_growth, plan_held_out
from l2d_ray.stages.settings import check_data, for_memory, record_memory
from l2d_ray.workspace import Workspace

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildResult:
    """Counts of the whole snapshot, and times of this run."""

    samples: int
    """Training samples: rows and quarantined samples."""
    rows: int
    quarantined: int
    tokens: int
    """Tokens that ran through the model."""
    tokens_one_by_one: int
    """Tokens that would have run if each sample had run alone."""
    units: int
    units_reused: int
    """Units that an earlier run had committed."""
    seconds: float
    """Duration of this run."""
    samples_per_second: float
    """Samples that this run built, divided by its duration."""
    snapshot: int
    """Number of the snapshot."""
    memory: str
    """Location of the memory."""


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
    newest = store.newest()
    kept, units = plan_growth(config, dataset, newest, known)
    missing = [unit for unit in units if unit.name not in known]
    if missing:
        check_room(config)  # before anything is written
    say(f"model: {config.model.name}, adapter: {config.model.adapter or 'none'}")
    record_memory(config, identity.dtype)
    built = list(_progress("building the memory", _build(config, identity, missing), len(missing)))
    names = [*kept, *(unit.name for unit in units)]
    records = [*(known[name] for name in names if name in known), *built]
    store.remove_strays(unit.name for unit in units)
    store.keep_items(dataset.digest, dataset.items())
    snapshot = store.take_snapshot(names, dataset.digest, config.memory.sample_fraction, kept)
    if any(record.tokens == record.tokens_one_by_one > 10_000 for record in built):
        logger.warning("model.name=%r: cannot run packed, so every prompt ran in full", config.model.name)
    seconds = time.monotonic() - started
    return BuildResult(
        samples=snapshot.rows + snapshot.quarantined,
        rows=snapshot.rows,
        quarantined=snapshot.quarantined,
        tokens=sum(record.tokens for record in records),
        tokens_one_by_one=sum(record.tokens_one_by_one for record in records),
        units=len(names),
        units_reused=len(names) - len(missing),
        seconds=round(seconds, 3),
        samples_per_second=round(sum(record.rows + record.quarantined for record in built) / seconds, 3),
        snapshot=snapshot.number,
        memory=workspace.path("memory"),
    )


def build_held_out(config: Config) -> None:
    """Compute the rows of the validation and test samples that the workspace lacks, for evaluate.memory=fresh.

    They are apart from the memory. The settings are those of the memory. Raises InputError if there are rows of another
    model.
    """
    workspace = Workspace.open(config.workspace)
    store, identity = held_out_store(workspace), identify_memory(config)
    units, known = plan_held_out(config, Dataset.open(workspace)), store.accept(identity)
    missing = [unit for unit in units if unit.name not in known]
    if missing:
        check_room(config)
        deque(_progress("validation and test rows", _build(config, identity, missing), len(missing)), maxlen=0)
    store.remove_strays(unit.name for unit in units)


class UnitActor:
    """A UnitExtractor as a callable for Ray Data: one unit in, its record out."""

    def __init__(self, config: dict[str, Any], identity: dict[str, Any]) -> None:
        """Load the model. The arguments are plain values, which a worker can read before it imports l2d_ray."""
        import torch  # it takes seconds, and the driver runs no model

        settings = Config(**config)
        torch.set_num_threads(settings.workers.cpus)
        self._extractor = UnitExtractor(settings, MemoryIdentity(**identity))

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        """Build the unit of a batch of one row."""
        start, stop, generation = (int(rows[name][0]) for name in ("start", "stop", "generation"))
        unit = Unit(str(rows["name"][0]), start, stop, generation, bool(rows["held_out"][0]))
        return {"record": [self._extractor.build(unit).model_dump_json()]}


def _build(config: Config, identity: MemoryIdentity, units: list[Unit]) -> Iterator[UnitRecord]:
    """Yield the records of these units as they are finished."""
    return in_rounds({unit.name: unit for unit in units}, lambda missing: _run(config, identity, missing))


def _run(config: Config, identity: MemoryIdentity, units: list[Unit]) -> Iterator[tuple[list[str], UnitRecord]]:
    """Build these units in one pass of Ray Data; yield their names and records."""
    records = ray.data.from_items([asdict(unit) for unit in units], override_num_blocks=len(units)).map_batches(
        UnitActor,
        batch_size=1,
        compute=actor_pool(config, len(units)),
        max_task_retries=3,
        **worker_options(config),
        fn_constructor_args=(config.model_dump(mode="json"), identity.model_dump()),
    )
    for row in records.iter_rows():
        record = UnitRecord.model_validate_json(row["record"])
        yield [record.unit], record


def _progress(label: str, records: Iterator[UnitRecord], total: int) -> Iterator[UnitRecord]:
    """Yield the records and show the progress, with samples and tokens per second."""
    started, samples, tokens = time.monotonic(), 0, 0
    with Progress(total, label, "units") as bar:
        for record in records:
            samples, tokens = samples + record.rows + record.quarantined, tokens + record.tokens
            seconds = time.monotonic() - started
            bar.advance(note=f"{samples / seconds:.1f} samples/s, {tokens / seconds:.0f} tokens/s")
            yield record

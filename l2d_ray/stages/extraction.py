"""Histories to memory rows, one unit at a time, without Ray.

A unit is a range of the dataset's users. Its samples become prompts, run through the model in batches and are written.
Samples that cannot be used go to the quarantine, with the reason. The content of a unit follows from the configuration
and the dataset alone, so that any worker can build it again with the same result.
"""

import hashlib
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from l2d_ray.config import Config
from l2d_ray.core.packing import Prompts
from l2d_ray.data.dataset import Dataset
from l2d_ray.data.files import join
from l2d_ray.data.samples import SampleBatch, iter_samples
from l2d_ray.encoding import HistoryEncoder, identify_memory
from l2d_ray.errors import InputError
from l2d_ray.memory.manifest import Snapshot, UnitRecord
from l2d_ray.memory.store import HELD_OUT, MemoryStore
from l2d_ray.memory.writer import UnitWriter
from l2d_ray.prefetch import prefetch
from l2d_ray.records import MemoryIdentity
from l2d_ray.schema import SAMPLES, Split
from l2d_ray.workspace import Workspace

SAMPLES_PER_UNIT, FEWEST_UNITS = 100_000, 64
FEWEST_SAMPLES = 250
"""Samples of a unit that was added to a memory: fewer would take less time than the start of a worker."""
PADDED_TOKENS_PER_BATCH = 1 << 20
"""Bound on the planner's memory: samples of a batch times the tokens of its longest prompt."""
SAMPLES_PER_STEP = 250
"""Samples that are tokenised between two checks of that bound."""


@dataclass(frozen=True)
class Unit:
    """A range of users of one generation of a dataset, from `start` to `stop` - 1."""

    name: str
    start: int
    stop: int
    generation: int = 0
    """Place of the generation among those of the dataset."""
    held_out: bool = False
    """Whether its samples are the validation and test samples, rather than the training samples."""

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits of its samples."""
        return (Split.VALID, Split.TEST) if self.held_out else (Split.TRAIN,)


@dataclass
class Batch:
    """Samples (schema.SAMPLES) to run together, and samples to quarantine."""

    samples: list[pa.Table] = field(default_factory=list)
    prompts: list[NDArray[np.int32]] = field(default_factory=list)
    refused: list[tuple[str, pa.Table]] = field(default_factory=list)
    """Pairs of a reason and its samples."""
    longest: int = 0
    """Tokens of the longest prompt."""

    def add(self, samples: pa.Table, prompts: list[NDArray[np.int32]], reasons: NDArray[np.object_]) -> None:
        """Add samples, their prompts, and the reason to refuse each sample ("" for none)."""
        for reason in set(reasons) - {""}:
            self.refused.append((reason, samples.filter(pa.array(reasons == reason))))
        fit = reasons == ""
        if fit.any():
            self.samples.append(samples.filter(pa.array(fit)))
            self.prompts += [prompts[n] for n in np.flatnonzero(fit)]
            self.longest = max(self.longest, *(prompt.size for prompt in self.prompts[-int(fit.sum()) :]))

    @property
    def is_full(self) -> bool:
        """Whether the batch has reached the planner's bound."""
        return len(self.prompts) * self.longest >= PADDED_TOKENS_PER_BATCH


def plan_units(config: Config, dataset: Dataset) -> list[Unit]:
    """Divide the users of each generation of the dataset into ranges: `memory.units`, or fewer for an added one.

    The name of a unit is a digest of the generation, the fraction and the number of units, and its place among them. So
    a dataset that grew keeps its units and gets more.
    """
    return [unit for number in range(len(dataset.generations)) for unit in _plan_generation(config, dataset, number)]


def plan_held_out(config: Config, dataset: Dataset) -> list[Unit]:
    """Divide the validation and test samples into units, like `plan_units`. `held_out_store` is the place for them."""
    numbers = range(len(dataset.generations))
    return [unit for number in numbers for unit in _plan_generation(config, dataset, number, held_out=True)]


def held_out_store(workspace: Workspace) -> MemoryStore:
    """Return the store of the units of `plan_held_out`, which has no snapshots."""
    return MemoryStore(Workspace.open(join(workspace.uri, HELD_OUT)))


def _plan_generation(config: Config, dataset: Dataset, number: int, held_out: bool = False) -> list[Unit]:
    generation, fraction = dataset.generations[number], config.memory.sample_fraction
    samples, users = generation.num_samples(Split.TRAIN), generation.num_users
    count = count_units(config, samples, users)
    if number > 0:
        count = min(count, math.ceil(samples * fraction / FEWEST_SAMPLES))
    label = hashlib.sha256(f"{generation.digest} {fraction} {count}".encode()).hexdigest()[:8]
    bounds = np.linspace(0, users, count + 1).astype(int).tolist()
    return [Unit(f"{label}-{k:05d}", bounds[k], bounds[k + 1], number, held_out) for k in range(count)]


def plan_growth(
    config: Config, dataset: Dataset, newest: Snapshot | None, committed: Collection[str]
) -> tuple[list[str], list[Unit]]:
    """Return the units of the newest snapshot that stay, and the units for the samples that it does not hold.

    All of its units stay if it is of the same fraction of this dataset, or of an earlier version. A unit of an earlier
    version is valid in each later one, because neither items, nor samples, nor their windows ever change. A snapshot
    with a unit that is no longer committed counts as none. So does one from before an erasure that it cannot catch up
    with, or from before generations that were merged. Raises InputError if it could, because jobs/erase.py was killed.
    """
    units, lineage = plan_units(config, dataset), dataset.version.lineage
    if (
        newest is None
        or newest.sample_fraction != config.memory.sample_fraction
        or newest.dataset not in lineage
        or not set(newest.units) <= set(committed)
    ):
        return [], units
    if dataset.version.erased_since(newest.dataset) != newest.dataset:
        raise InputError(
            f"{dataset.workspace.path('memory')}: snapshot {newest.number} has rows that were erased from the dataset;"
            " run jobs/erase.py again, as it was run last"
        )
    later = set(dataset.version.since(newest.dataset))
    if later & set(dataset.version.erasures) or not _adds_up(dataset, newest.dataset, later):
        return [], units
    return newest.units, [unit for unit in units if dataset.generations[unit.generation].digest in later]


def _adds_up(dataset: Dataset, digest: str, later: Collection[str]) -> bool:
    """Return whether the generations of the digests `later` have what a dataset has more than an older version of it.

    They do not if a compaction has merged them with others.
    """
    try:
        older = Dataset.open(dataset.workspace, digest)
    except InputError:
        return False
    new = [one.num_samples(Split.TRAIN) for one in dataset.generations if one.digest in later]
    return older.num_samples(Split.TRAIN) + sum(new) == dataset.num_samples(Split.TRAIN)


def count_units(config: Config, samples: int, users: int | None = None) -> int:
    """Return the number of units for a dataset with this many training samples; None stands for enough users."""
    wanted = config.memory.units or max(FEWEST_UNITS, round(samples * config.memory.sample_fraction / SAMPLES_PER_UNIT))
    return wanted if users is None else min(wanted, users)


class UnitExtractor:
    """Builder of units, which holds the model, the tokenised items and the dataset's manifest."""

    def __init__(self, config: Config, identity: MemoryIdentity) -> None:
        """Load the model, on `config.device`. Raises InputError if it is not the model of `identity`."""
        workspace = Workspace.open(config.workspace)
        differences = identify_memory(config).differences(identity)
        if differences:
            raise InputError(
                f"model.name={config.model.name!r}: differs on this node from the driver's: {', '.join(differences)};"
                " give every node the same files"
            )
        self._config, self._identity = config, identity
        self._dataset = Dataset.open(workspace)
        self._units = {*plan_units(config, self._dataset), *plan_held_out(config, self._dataset)}
        self._stores = {False: MemoryStore(workspace), True: held_out_store(workspace)}
        titles = self._dataset.items()["title"].to_pylist()
        self._num_items = len(titles)
        self.encoder = HistoryEncoder(config, titles)

    def build(self, unit: Unit) -> UnitRecord:
        """Run, write and commit a unit; leave a unit that is committed already as it is."""
        if unit not in self._units:
            raise InputError(
                f"{self._dataset.workspace.path('dataset')}: changed while its memory was built; run the same command"
                " again"
            )
        store = self._stores[unit.held_out]
        committed = store.committed(unit.name)
        if committed:
            store.accept_unit(committed, self._identity)
            return committed
        with store.write_unit(unit.name, self._identity) as writer:
            for batch in prefetch(self.batches(unit)):
                self._run(batch, writer)
        record = store.committed(unit.name)
        assert record, "committed above"
        return record

    def batches(self, unit: Unit) -> Iterator[Batch]:
        """Yield the unit's samples and their prompts in batches of bounded memory, whatever the size of the unit."""
        batch = Batch()
        for samples in self._steps(unit):
            batch.add(*self._phrase(samples))
            if batch.is_full:
                yield batch
                batch = Batch()
        if batch.prompts or batch.refused:
            yield batch

    def _steps(self, unit: Unit) -> Iterator[SampleBatch]:
        """Yield the unit's samples, at most SAMPLES_PER_STEP of one user at a time."""
        history, fraction = self._config.history, self._config.memory.sample_fraction
        generation = self._dataset.generations[unit.generation]
        for batch in iter_samples(generation, unit.splits, unit.start, unit.stop):
            for samples in batch.in_fraction(history, fraction).by_user():
                for start in range(0, len(samples), SAMPLES_PER_STEP):
                    yield samples.select(slice(start, start + SAMPLES_PER_STEP))

    def _phrase(self, samples: SampleBatch) -> tuple[pa.Table, list[NDArray[np.int32]], NDArray[np.object_]]:
        """Return samples of one user as schema.SAMPLES, with prompts and reasons as `Batch.add` takes them."""
        starts = samples.window_starts(self._config.history)
        span = slice(starts.min(), samples.stops.max() + 1)
        starts, stops, items = starts - span.start, samples.stops - span.start, samples.items[span]
        unknown = (items < 0) | (items >= self._num_items)
        unknown_before = np.append(0, np.cumsum(unknown))
        prompts = self.encoder.prompts.encode(np.where(unknown, 0, items), starts, stops)
        lengths = np.array([prompt.size for prompt in prompts])
        reasons = np.full(lengths.size, "", object)
        reasons[lengths > self.encoder.backbone.context_length] = "prompt longer than the model's context"
        reasons[lengths == 0] = "empty prompt"
        reasons[samples.positions == 0] = "empty history"
        reasons[unknown_before[stops + 1] > unknown_before[starts]] = "unknown item"
        columns = [samples.sample_ids, samples.user_hashes, samples.targets, samples.target_timestamps]
        return pa.table(columns, schema=SAMPLES), prompts, reasons

    def _run(self, batch: Batch, writer: UnitWriter) -> None:
        for reason, samples in batch.refused:
            writer.quarantine(samples, reason)
        if batch.prompts:
            prompts = Prompts.join(batch.prompts)
            result = self.encoder.extract(prompts)
            # A number past 65504 becomes infinite in float16; the writer quarantines such rows.
            writer.write(pa.concat_tables(batch.samples), result.states.half().numpy())
            writer.count_tokens(result.tokens, prompts.tokens.size)

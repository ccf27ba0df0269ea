"""The plan of a memory and its index: hardware, hours, storage, requests and money, before anything is built."""

from dataclasses import dataclass

import torch

from l2d_ray.bench.build import extract_only
from l2d_ray.config import Config
from l2d_ray.core.capacity import MemorySizes, Rates
from l2d_ray.data.dataset import Dataset
from l2d_ray.distributed.screen import say
from l2d_ray.encoding import identify_memory
from l2d_ray.index.engine import engine
from l2d_ray.schema import Split
from l2d_ray.stages.extraction import Unit, UnitExtractor, count_units
from l2d_ray.stages.index_plan import resolve_factory
from l2d_ray.stages.settings import for_memory
from l2d_ray.timing import timed
from l2d_ray.workspace import Workspace

ASSUMPTIONS = [
    "workers are alike; each of several has the rate of one times capacity.scaling",
    "building the index is left out: its hours are few next to the model's",
    "nodes that are lost are left out; each repeats at most the units that its workers had begun",
    "the head node, idle nodes and networks cost nothing",
]


@dataclass(frozen=True)
class CapacityPlan:
    """Cost of a memory, its index and its endpoint. A gigabyte is 1e9 bytes."""

    inputs: dict[str, float | None]
    """Sizes, rates and prices that the plan follows from."""
    assumptions: list[str]
    workers: int
    cpus: int
    """CPUs of all workers."""
    gpus: float
    """GPUs of all workers."""
    training_hours: float | None
    """None without capacity.training_samples_per_second."""
    build_hours: float
    units: int
    """Units, each with one commit record."""
    data_files: int
    writes: int
    """Requests that write or list."""
    reads: int
    """Requests that read."""
    memory_gigabytes: float
    """Files of the memory."""
    factory: str
    """FAISS factory string of the index."""
    index_gigabytes: float
    """Files of the index."""
    serving_gigabytes: float
    """Main memory of all replicas of all shards. The rows of it stay on the disk if the workspace is a folder."""
    compute_dollars: float
    request_dollars: float
    storage_dollars_per_month: float


def plan_capacity(config: Config) -> CapacityPlan:
    """Plan what `config` describes, for `workers.max` workers (1 if it is null). Prints inputs and assumptions.

    Raises InputError if the workspace has no dataset and the sizes and rates are not given.
    """
    config = for_memory(config)
    given, workers = config.capacity, config.workers.max or 1
    sizes, items, training_samples = _sizes(config)
    rate = given.samples_per_second or _measured_rate(config)
    build_hours = Rates(rate, given.start_seconds, given.scaling).seconds(sizes.samples, workers) / 3600
    training_hours = None
    if given.training_samples_per_second:
        training = Rates(given.training_samples_per_second, given.start_seconds, given.scaling)
        training_hours = training.seconds(training_samples * config.finetune.epochs, workers) / 3600
    factory, index_bytes = _index(config, sizes, items)
    requests = sizes.writes * given.dollars_per_million_writes + sizes.reads * given.dollars_per_million_reads
    counts = {"samples": sizes.samples, "items": items, "dimension": sizes.dimension, "shards": sizes.shards}
    inputs = given.model_dump() | counts | {"samples_per_second": round(rate, 3)}
    for name, value in inputs.items():
        say(f"input: {name} = {value}")
    for assumption in ASSUMPTIONS:
        say(f"assumption: {assumption}")
    return CapacityPlan(
        inputs=inputs,
        assumptions=ASSUMPTIONS,
        workers=workers,
        cpus=workers * config.workers.cpus,
        gpus=workers * config.workers.gpus,
        training_hours=None if training_hours is None else round(training_hours, 4),
        build_hours=round(build_hours, 4),
        units=sizes.units,
        data_files=sizes.files,
        writes=sizes.writes,
        reads=sizes.reads,
        memory_gigabytes=round(sizes.bytes / 1e9, 4),
        factory=factory,
        index_gigabytes=round(index_bytes / 1e9, 4),
        serving_gigabytes=round(index_bytes * config.serve.shard_replicas / 1e9, 4),
        compute_dollars=round((build_hours + (training_hours or 0)) * workers * given.dollars_per_worker_hour, 2),
        request_dollars=round(requests / 1e6, 2),
        storage_dollars_per_month=round((sizes.bytes + index_bytes) / 1e9 * given.dollars_per_gigabyte_month, 2),
    )


def _sizes(config: Config) -> tuple[MemorySizes, int, int]:
    """Return the sizes of the memory, and the numbers of items and of training samples."""
    given, users = config.capacity, None
    samples, items = given.samples, given.items
    if samples is None or items is None:
        dataset = Dataset.open(Workspace.open(config.workspace))
        if samples is None:
            samples, users = dataset.num_samples(Split.TRAIN), dataset.num_users
        items = items or dataset.items().num_rows
    rows = round(samples * config.memory.sample_fraction)
    dimension = given.dimension or identify_memory(config).dimension
    return MemorySizes(rows, count_units(config, samples, users), config.memory.num_shards, dimension), items, samples


def _measured_rate(config: Config) -> float:
    """Run about `bench.samples` samples in this process as a worker does; return the samples per second."""
    dataset = Dataset.open(Workspace.open(config.workspace))
    share = config.bench.samples / max(dataset.num_samples(Split.TRAIN), 1)
    users = min(dataset.num_users, max(1, round(dataset.num_users * share)))
    extractor = UnitExtractor(config, identify_memory(config))
    torch.set_num_threads(config.workers.cpus)
    extract_only(extractor, Unit("warm-up", 0, 1))
    seconds, samples = timed(lambda: extract_only(extractor, Unit("measured", 0, users)))
    return samples / seconds


def _index(config: Config, sizes: MemorySizes, items: int) -> tuple[str, int]:
    """Return the factory string of the index and the bytes of its files."""
    rows = round(sizes.samples * config.index.sample_fraction)
    factory = resolve_factory(config.index, sizes.samples, sizes.shards, sizes.dimension)
    factory = engine.complete_factory(factory, -(-rows // sizes.shards), sizes.dimension)
    per_row = 2 * sizes.dimension + 12 + engine.bytes_per_vector(factory, sizes.dimension)
    return factory, rows * per_row + items * (4 * sizes.dimension + 12)

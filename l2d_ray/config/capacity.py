"""Settings of jobs/plan_capacity.py."""

from pydantic import Field

from l2d_ray.config.section import Section


class CapacityConfig(Section):
    """Inputs of jobs/plan_capacity.py: sizes, measured rates and prices."""

    samples: int | None = Field(None, ge=1)
    """Training samples. null: those of the workspace's dataset."""
    items: int | None = Field(None, ge=1)
    """Items of the catalogue. null: those of the workspace's dataset."""
    dimension: int | None = Field(None, ge=1)
    """Numbers of a hidden state. null: read from the model, which is downloaded for it."""
    samples_per_second: float | None = Field(None, gt=0)
    """Samples per second of one worker that builds a memory (jobs/bench_scale.py). null: measured on this machine with
    bench.samples samples of the dataset."""
    training_samples_per_second: float | None = Field(None, gt=0)
    """Samples per second of one worker that trains (jobs/bench_finetune.py). null: fine-tuning is left out."""
    scaling: float = Field(0.87, gt=0)
    """Samples per second of each of several workers, over those of one alone. jobs/bench_scale.py measures it. 0.87
    is cautious: that of two workers on two cores, over one worker that had both (jobs/RESULTS.md)."""
    start_seconds: float = Field(300, ge=0)
    """Seconds from the start of a job until its workers build: nodes start, models load."""
    dollars_per_worker_hour: float = Field(0, ge=0)
    """Price of the machine, or the part of one, that a worker runs on."""
    dollars_per_gigabyte_month: float = Field(0, ge=0)
    """Price of storage, for 1e9 bytes."""
    dollars_per_million_writes: float = Field(0, ge=0)
    """Price of requests that write or list."""
    dollars_per_million_reads: float = Field(0, ge=0)
    """Price of requests that read."""

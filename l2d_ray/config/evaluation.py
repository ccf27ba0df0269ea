"""Settings of the evaluation, of the export of its samples, and of the benchmarks."""

from typing import Annotated

from pydantic import Field

from l2d_ray.config.section import Folder, Name, Section


class EvaluateConfig(Section):
    """The evaluation on test data."""

    recommenders: list[str] = Field(
        [
            "most-popular",
            "co-occurrence",
            "l2d-global-none",
            "l2d-local-none",
            "l2d-global",
            "l2d-local",
            "l2d",
            "constrained-beam-20",
            "grounded-beam",
        ],
        min_length=1,
    )
    """Recommenders to compare. L2D takes a space (`l2d-local-none`) in place of index.space, and `l2d-global+prior` the
    best of evaluate.priors. `l2d` adds transitions, and scores by probability. constrained-beam and gpt4rec take the
    number of beams (`gpt4rec-20`). There are also transitions, popularity-window, ease, title-knn, bigrec and d3.
    Validation chooses the number of the last five unless it is given (`popularity-window-7`, in days). `file:PATH` has
    recommendations of another system (l2d_ray/recommenders/from_file.py)."""
    samples: int = Field(10_000, ge=1)
    """Maximum number of test samples, and of validation samples; chosen by sample id."""
    generation_samples: int = Field(200, ge=1)
    """Maximum number of test and of validation samples for recommenders that generate text. It takes seconds a sample.
    The others run on these test samples, too, for comparison."""
    generation_batch_size: int = Field(8, ge=1)
    """Prompts that beam search continues at once."""
    top_m: list[Annotated[int, Field(ge=1)]] = Field([20, 50, 100, 200, 500, 1000], min_length=1)
    """Values of recommend.top_m to try on validation data."""
    priors: list[Annotated[float, Field(ge=0)]] = Field([0.0, 1.0, 2.0, 3.0, 4.0], min_length=1)
    """Values of index.prior to try on validation data, for `+prior`."""
    fractions: list[Annotated[float, Field(gt=0, le=1)]] = Field([0.1, 0.3, 1.0])
    """Shares of the memory for the plot of Recall against memory size."""
    batch_size: int = Field(64, ge=1)
    """Samples that are encoded and recommended together."""
    name: Name = "evaluation"
    """Name of the report's files in reports/."""


class ExportConfig(Section):
    """The export of the samples, jobs/export_samples.py."""

    folder: Folder | None = None
    """Folder or URI for the files. null: export/ in the workspace."""


class BenchConfig(Section):
    """The benchmarks, jobs/bench_*.py."""

    samples: int = Field(400, ge=1)
    """Samples to run."""
    repeats: int = Field(3, ge=1)
    """Runs of each variant, alternating."""
    threads: int | None = Field(None, ge=1)
    """CPU threads. null: workers.cpus."""
    seconds: int = Field(20, ge=1)
    """Duration of each load on the endpoint, in seconds (jobs/bench_serve.py)."""
    scales: list[Annotated[int, Field(ge=1)]] = Field([1, 10, 100], min_length=2)
    """Numbers by which bench.samples are multiplied (jobs/bench_scale.py)."""
    workers: int = Field(2, ge=1)
    """Workers to compare with one (jobs/bench_scale.py)."""
    rows: list[Annotated[int, Field(ge=1000)]] = Field([100_000, 1_000_000], min_length=1)
    """Rows of the synthetic memories (jobs/bench_search.py)."""
    shards: list[Annotated[int, Field(ge=1)]] = Field([1, 4], min_length=1)
    """Numbers of shards to index each memory in (jobs/bench_search.py)."""
    dimension: int = Field(576, ge=8)
    """Dimension of the rows (jobs/bench_search.py)."""
    factories: list[str] = Field(["Flat", "HNSW32", "IVF,SQfp16", "IVF_HNSW32,PQ"], min_length=1)
    """FAISS factory strings (jobs/bench_search.py). IVF and PQ without numbers are sized by rows and dimension."""

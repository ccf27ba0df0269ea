"""Settings of the evaluation, of comparisons, of the export of samples, and of the benchmarks."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from l2d_ray.config.section import File, Folder, Name, Section


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
    number of beams (`gpt4rec-20`). There are also transitions, popularity-window, ease, title-knn, tgh, bigrec and d3.
    Validation chooses the number of the last six unless it is given (`popularity-window-7`, in days). `file:PATH` has
    recommendations of another system (l2d_ray/recommenders/from_file.py). `fused` adds
    the log-probabilities of l2d and sasrec, with weights that are fitted on validation samples;
    `fused:transitions+sasrec` those of the named ones."""
    reference: str | None = None
    """Recommender whose Recall@20 is divided by that of each other one, with an interval. null: the first of L2D."""
    samples: int = Field(10_000, ge=1)
    """Maximum number of test samples, and of validation samples; chosen by sample id."""
    candidates: Literal["catalogue", "appeared"] = "catalogue"
    """Items that may be recommended: the catalogue, or those that have appeared by the time of the target. An item
    appears with its first interaction in the dataset, of any user and split. So the target has always appeared."""
    memory: Literal["stale", "fresh"] = "stale"
    """Samples that recommenders know. `stale`: the training samples. `fresh`: all that are older than the query, of any
    split, with the same model and the same trained weights (l2d_ray/stages/fresh.py)."""
    refresh_days: int = Field(1, ge=1)
    """Days between two refreshes with evaluate.memory=fresh. A query sees what is older than the last one, which is at
    midnight (UTC)."""
    earlier_report: Name | None = None
    """Name of an earlier report. The metrics of each recommender are compared with those that it had there, sample by
    sample (`changes` in the result)."""
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

    @model_validator(mode="after")
    def _check_reference(self) -> Self:
        if self.reference is not None and self.reference not in self.recommenders:
            raise ValueError(
                f"evaluate.reference={self.reference!r} is not among evaluate.recommenders; add it there, or give one"
                " of them"
            )
        return self


class CompareConfig(Section):
    """The comparison of recommenders, jobs/compare.py."""

    seeds: list[Annotated[int, Field(ge=0)]] = Field([0, 1], min_length=1)
    """Seeds that each trained recommender is trained with. One with a further seed is named `NAME-seed1`."""
    tune: bool = False
    """Search first for the settings of each trained recommender, as jobs/tune.py does with tune.trials."""


class ExportConfig(Section):
    """The export of the samples, jobs/export_samples.py."""

    folder: Folder | None = None
    """Folder or URI for the files. null: export/ in the workspace."""


class BenchConfig(Section):
    """The benchmarks, jobs/bench_*.py."""

    only: list[str] = Field([])
    """Benchmarks of jobs/benchmarks.yaml to run (jobs/bench_all.py). Empty: all."""
    peers: dict[str, File] = Field({})
    """Python of each engine's virtual environment, by the NAME of jobs/peers/NAME_states.py (jobs/bench_peers.py)."""
    samples: int = Field(400, ge=1)
    """Samples to run."""
    repeats: int = Field(3, ge=1)
    """Runs of each variant, alternating."""
    threads: int | None = Field(None, ge=1)
    """CPU threads. null: workers.cpus."""
    seconds: int = Field(20, ge=1)
    """Duration of each load on the endpoint, in seconds (jobs/bench_serve.py, jobs/bench_append.py)."""
    rate: float = Field(10.0, gt=0)
    """Requests per second on an endpoint whose memory grows (jobs/bench_append.py)."""
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

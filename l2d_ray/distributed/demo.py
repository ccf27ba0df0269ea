"""The demo: every stage on this machine, recommendations within minutes, and a table of recommenders at the end.

This process starts a local Ray with a job server. The memory is built by a submitted job, as on a cluster.
"""

import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.cluster_utils import Cluster
from ray.job_submission import JobStatus, JobSubmissionClient

from l2d_ray.api import load
from l2d_ray.config import Config
from l2d_ray.data.dataset import MANIFEST, Dataset
from l2d_ray.data.samples import choose_samples
from l2d_ray.data.sources import source_of
from l2d_ray.distributed.build_index import build_index
from l2d_ray.distributed.evaluate import evaluate
from l2d_ray.distributed.job import quiet_ray_data
from l2d_ray.distributed.pipeline import Titles, describe
from l2d_ray.distributed.prepare import prepare
from l2d_ray.distributed.progress import Progress
from l2d_ray.distributed.ray_settings import KEEP_IDLE_WORKERS, set_local_variables
from l2d_ray.distributed.screen import log_file, say
from l2d_ray.distributed.training.driver import finetune
from l2d_ray.distributed.workers import workers_that_fit
from l2d_ray.errors import InputError, one_line
from l2d_ray.memory.store import MemoryStore
from l2d_ray.memory.verify import verify
from l2d_ray.models.checkpoint import find_model
from l2d_ray.schema import Split
from l2d_ray.stages.extraction import plan_units
from l2d_ray.workspace import Workspace

STAGES = 7
OBJECT_STORE_BYTES = 500 << 20
SERVER_SECONDS = 90.0
"""Time that Ray's job server has to start."""


@dataclass(frozen=True)
class DemoResult:
    """Recommendations to one user, and where the results of the stages are."""

    history: list[str]
    """The user's last titles."""
    recommended: list[str]
    """Titles, best first; those of the history are left out."""
    next: str
    """The title that came next."""
    recall_at_20: dict[str, float]
    """By recommender."""
    report: str
    """Location of the evaluation."""
    workspace: str
    seconds: float


def demo(config: Config) -> DemoResult:
    """Run every stage; what an earlier run left in the workspace is used again.

    The submitted job gets this process's command line. Raises InputError as the stages do.
    """
    titles = Titles(STAGES)
    say(f"Libraries write to {log_file()}")
    workspace = Workspace.open(config.workspace)
    titles.show("Download the model and the data")
    with Progress(None, "download"):
        find_model(config.model)
        source_of(config).interaction_files(config)
    with _ray_with_job_server() as cluster:
        titles.show("prepare_data: histories of users, and their split")
        dataset = _prepared_dataset(config, workspace)
        titles.show("build_memory, with `ray job submit`: the hidden state of every training sample")
        _build_memory(config, dataset, cluster)
        titles.show("build_index: FAISS shards, item means and the whitened space")
        index = build_index(config)
        say(f"{index.rows:,} rows of {index.items:,} items in {index.shards} shards")
        titles.show("Recommend to one user, with L2D-G")
        history, recommended, target = _recommend(workspace, dataset)
        titles.show("finetune, briefly: this demo recommends with the model as it comes")
        tuned = finetune(config)
        losses = f"{tuned.train_loss:.2f} per token, {tuned.valid_loss:.2f} on validation data"
        say(f"{tuned.samples:,} samples: loss {losses}")
        titles.show("evaluate: for how many percent of users the next item is among the first 20, 50 and 100")
        evaluation = evaluate(config)
    return DemoResult(
        history=history,
        recommended=recommended,
        next=target,
        recall_at_20={row["recommender"]: row["recall@20"] for row in evaluation.results},
        report=evaluation.report,
        workspace=workspace.uri,
        seconds=titles.seconds,
    )


@contextmanager
def _ray_with_job_server() -> Iterator[Cluster]:
    """Start a Ray on this machine that accepts jobs, connect to it, and stop it when the block ends.

    It is not `ray.init`, whose job agent listens on a fixed port that another Ray may have.
    """
    head = {
        "num_cpus": max(4, os.cpu_count() or 1),
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": True,
        "dashboard_port": None,
        "dashboard_agent_listen_port": 0,
        "_system_config": KEEP_IDLE_WORKERS,
    }
    set_local_variables()
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        quiet_ray_data()
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def _prepared_dataset(config: Config, workspace: Workspace) -> Dataset:
    """Return the dataset of `config.data`, prepared unless the workspace has it."""
    if not workspace.exists(MANIFEST) or Dataset.open(workspace).manifest["data"] != config.data.model_dump(
        mode="json"
    ):
        prepare(config)
    dataset = Dataset.open(workspace)
    describe(dataset)
    return dataset


def _build_memory(config: Config, dataset: Dataset, cluster: Cluster) -> None:
    """Submit jobs/build_memory.py, show how many units are committed, and check the files it leaves.

    Raises InputError, with the job's own message, if it fails.
    """
    workspace, store = dataset.workspace, MemoryStore(dataset.workspace)
    command = [sys.executable, "jobs/build_memory.py", *sys.argv[1:], f"workspace={workspace.uri}"]
    if config.workers.max is None:  # the job would take this Ray for a cluster that grows, and ask it for more
        command.append(f"workers.max={workers_that_fit(config)}")
    # Ray would give the job the address of any Ray that it finds on the machine.
    client, job = _submit(f"http://{cluster.webui_url}", ["env", f"RAY_ADDRESS={cluster.address}", *command])
    units = {unit.name for unit in plan_units(config, dataset)}
    with Progress(len(units), "build the memory", "units") as progress:
        while not (status := client.get_job_status(job)).is_terminal():
            time.sleep(0.5)
            progress.advance(len(units & store.units().keys()) - progress.done)
    lines = client.get_job_logs(job).strip().splitlines()
    if status != JobStatus.SUCCEEDED:  # a job that Ray could not start has no lines
        raise InputError(lines[-1].removeprefix("error: ") if lines else one_line(client.get_job_info(job).message))
    built = json.loads(lines[-1])
    say(f"{built['tokens']:,} tokens went through the model; one sample at a time: {built['tokens_one_by_one']:,}")
    if problems := verify(workspace).problems:
        raise InputError(problems[0])


def _submit(address: str, command: list[str]) -> tuple[JobSubmissionClient, str]:
    """Submit a job that runs in a copy of this folder, as soon as Ray's job server accepts it."""
    deadline = time.monotonic() + SERVER_SECONDS
    while True:
        try:
            client = JobSubmissionClient(address)
            return client, client.submit_job(entrypoint=shlex.join(command), runtime_env={"working_dir": "."})
        except (ConnectionError, RuntimeError) as error:  # it answers before it has an agent to run jobs
            if time.monotonic() > deadline:
                raise InputError(
                    f"Ray accepted no job within {SERVER_SECONDS:.0f} s ({one_line(error)}); run the same command again"
                ) from None
            time.sleep(1)


def _recommend(workspace: Workspace, dataset: Dataset, k: int = 10) -> tuple[list[str], list[str], str]:
    """Recommend for one test sample; return the last titles of its history, the recommended ones and the next one."""
    (sample,) = choose_samples(dataset, Split.TEST, 1)
    ids, titles = (dataset.items()[name].to_pylist() for name in ("item_id", "title"))
    found = load(workspace.uri).recommend([ids[item] for item in sample.history], k)
    history, target = [titles[item] for item in sample.history[-k:]], titles[sample.target]
    say(f"After {'; '.join(history)}:")
    for rank, one in enumerate(found, start=1):
        say(f"{rank:3}. {one.title}")
    say(f"The user's next choice was {target}")
    return history, [one.title for one in found], target

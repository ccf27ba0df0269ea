"""The whole way in minutes on a laptop: prepare, fine-tune, submit the main job, verify, index, evaluate, recommend.

A local Ray with a job server is started by this process; the memory is built by `ray job submit`, as on a cluster.
"""

import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster

from l2d_ray.config import Config
from l2d_ray.core.query import Query
from l2d_ray.data.dataset import Dataset
from l2d_ray.data.files import join
from l2d_ray.distributed.build_index import build_index
from l2d_ray.distributed.build_memory import build_memory
from l2d_ray.distributed.evaluate import EvaluateResult, evaluate
from l2d_ray.distributed.job import quiet_ray_data
from l2d_ray.distributed.prepare import prepare
from l2d_ray.distributed.training.driver import check, finetune
from l2d_ray.encoding import HistoryEncoder
from l2d_ray.errors import InputError
from l2d_ray.index.sharding import ShardedIndex
from l2d_ray.memory.verify import verify
from l2d_ray.recommenders.l2d import L2DRecommender
from l2d_ray.schema import Split
from l2d_ray.stages.finetuning import tuned
from l2d_ray.stages.index_plan import plan_index
from l2d_ray.stages.summary import CUTOFFS
from l2d_ray.workspace import Workspace

OBJECT_STORE_BYTES = 500 << 20
COMPARED = ["l2d-global", "l2d-local"]


@dataclass(frozen=True)
class DemoResult:
    """One user's recommendations, and the workspace in which everything can be looked at."""

    user: str
    history: list[str]
    """Titles, the last ones."""
    recommended: list[str]
    """Titles, the best first, without those of the history."""
    next: str
    """The title that came next."""
    report: str
    """Location of the evaluation."""
    workspace: str


def demo(config: Config) -> DemoResult:
    """Run every stage there is. The command line that made `config` is passed on to the submitted job."""
    workspace = Workspace.open(config.workspace)
    check(config)
    # Not ray.init, whose job agent listens on a fixed port, which another Ray on this machine may have.
    ports = {"dashboard_port": None, "dashboard_agent_listen_port": 0}
    head = {"num_cpus": max(4, os.cpu_count() or 1), "include_dashboard": True, **ports}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "object_store_memory": OBJECT_STORE_BYTES})
    ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    quiet_ray_data()
    _say("1. prepare_data", json.dumps(asdict(prepare(config))))
    _say("2. the model as it comes", "a memory and an evaluation, to compare with")
    untuned = _evaluate_untuned(config, workspace)
    _say("3. finetune")
    tuning = finetune(config)
    _say("", json.dumps(asdict(tuning)))
    config = tuned(config, tuning.adapter)
    _say("4. ray job submit -- python jobs/build_memory.py")
    ray_command = str(Path(sys.executable).with_name("ray"))
    submit = [ray_command, "job", "submit", "--address", f"http://{cluster.webui_url}", "--working-dir", "."]
    model = [f"model.name={config.model.name}"]
    model += [f"model.adapter={config.model.adapter}"] if config.model.adapter else []
    # Named, for Ray gives a job the address of any Ray that it finds on the machine.
    job = ["env", f"RAY_ADDRESS={cluster.address}", "python", "jobs/build_memory.py"]
    job += [*sys.argv[1:], f"workspace={workspace.uri}", *model]
    _wait_for_agent(submit)
    if subprocess.run([*submit, "--", *job], check=False).returncode:
        raise InputError("the submitted job failed; its own message is above")
    _say("5. verify", json.dumps(asdict(verify(workspace))))
    _say("6. build_index", json.dumps(asdict(build_index(config))))
    _say("7. evaluate", "what the recommenders find, and what a user costs")
    evaluation = evaluate(config)
    ray.shutdown()
    cluster.shutdown()
    print(f"\nbefore and after {tuning.seconds:.0f} s of fine-tuning\n{_before_and_after(untuned, evaluation)}")
    result = recommend(config, workspace, evaluation.report)
    _say("8. recommend", f"user {result.user}, who last chose:", *result.history, "", "L2D-G recommends:")
    _say("", *result.recommended, "", f"what came next: {result.next}")
    return result


def _evaluate_untuned(config: Config, workspace: Workspace) -> EvaluateResult:
    """L2D with the model as it comes, in a workspace of its own with the same dataset."""
    own = Workspace.open(join(workspace.uri, "untuned"))
    workspace.copy("dataset", own, "dataset")
    config = config.replace({"workspace": own.uri, "evaluate.recommenders": COMPARED, "evaluate.fractions": []})
    build_memory(config)
    return evaluate(config)


def _before_and_after(before: EvaluateResult, after: EvaluateResult) -> str:
    """The rows of both that can be compared."""
    rows = {"before": before.results, "after": after.results}
    return "\n".join(
        f"{when:8}{row['recommender']:14}" + "".join(f"  recall@{k} {100 * row[f'recall@{k}']:6.2f}" for k in CUTOFFS)
        for name in COMPARED
        for when, results in rows.items()
        for row in results
        if row["recommender"] == name
    )


def _wait_for_agent(submit: list[str], seconds: float = 90) -> None:
    """Until a job that does nothing is accepted: a young Ray answers before its job agent does."""
    deadline = time.monotonic() + seconds
    nothing = [*submit[: submit.index("--working-dir")], "--no-wait", "--", "true"]
    while subprocess.run(nothing, capture_output=True, check=False).returncode:
        if time.monotonic() > deadline:
            raise InputError(f"Ray accepted no job within {seconds:.0f} s; run the same command again")
        time.sleep(2)


def recommend(config: Config, workspace: Workspace, report: str, k: int = 10) -> DemoResult:
    """Recommend by L2D-G to the first user who has a test sample."""
    dataset = Dataset.open(workspace)
    titles = dataset.items()["title"].to_pylist()
    user, position = _first_test_sample(dataset)
    history = np.array(user["item_indices"][:position], np.int32)
    encoder = HistoryEncoder(config, titles)
    prior = config.index.prior_in(config.index.space)
    index = ShardedIndex.open(workspace, plan_index(config).manifest).with_prior(prior)
    recommender = L2DRecommender(encoder.encode, index)
    (best,) = recommender.recommend([Query.after(history, k, config.recommend.exclude_seen)])
    return DemoResult(
        user=user["user_id"],
        history=[titles[item] for item in history[-config.history.max_items :]],
        recommended=[titles[item] for item in best.items_I],
        next=titles[user["item_indices"][position]],
        report=report,
        workspace=workspace.uri,
    )


def _first_test_sample(dataset: Dataset) -> tuple[dict[str, Any], int]:
    for users in dataset.iter_users():
        for user in users.to_pylist():
            if Split.TEST in user["splits"]:
                return user, user["splits"].index(Split.TEST)
    raise AssertionError("prepare leaves no dataset without test samples")


def _say(title: str, *lines: str) -> None:
    if title:
        print(f"\n== {title}", file=sys.stderr)
    for line in lines:
        print(f"   {line}", file=sys.stderr)

"""The whole way in minutes on a laptop: prepare, submit the main job, verify, and recommend for one user.

A local Ray with a job server is started in this process; the memory is built by `ray job submit`, as on a cluster.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from l2d_ray.config import Config
from l2d_ray.core.decoding import global_scores, item_sums, top_k
from l2d_ray.core.packing import Prompts
from l2d_ray.core.samples import window_starts
from l2d_ray.data.dataset import Dataset
from l2d_ray.distributed.job import quiet
from l2d_ray.distributed.prepare import prepare
from l2d_ray.errors import InputError
from l2d_ray.memory.store import MemoryStore
from l2d_ray.memory.verify import verify
from l2d_ray.models.backbone import load_backbone
from l2d_ray.models.hidden_states import packed_states
from l2d_ray.prompts import PromptEncoder
from l2d_ray.schema import Split, hidden_states
from l2d_ray.workspace import Workspace


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
    workspace: str


def demo(config: Config, overrides: Sequence[str]) -> DemoResult:
    """Run every stage there is; `overrides` is the command line that made `config`, passed on to the submitted job."""
    workspace = Workspace.open(config.workspace)
    context = ray.init(num_cpus=max(4, os.cpu_count() or 1), include_dashboard=True, log_to_driver=False)
    quiet()
    _say("1. prepare_data", json.dumps(asdict(prepare(config))))
    _say("2. ray job submit -- python jobs/build_memory.py")
    ray_command = str(Path(sys.executable).with_name("ray"))
    submit = [ray_command, "job", "submit", "--address", f"http://{context.dashboard_url}", "--working-dir", "."]
    job = ["python", "jobs/build_memory.py", *overrides, f"workspace={workspace.root}"]
    # A Ray that `init` starts asks for a token; the command line offers the one it wrote only when told to.
    environment = {**os.environ, "RAY_AUTH_MODE": "token"}
    _wait_for_agent(submit, environment)
    if subprocess.run([*submit, "--", *job], env=environment, check=False).returncode:
        raise InputError("the submitted job failed; its own message is above")
    ray.shutdown()
    _say("3. verify", json.dumps(asdict(verify(workspace))))
    result = recommend(config, workspace)
    _say("4. recommend", f"user {result.user}, who last chose:", *result.history, "", "L2D-G recommends:")
    _say("", *result.recommended, "", f"what came next: {result.next}")
    return result


def _wait_for_agent(submit: list[str], environment: dict[str, str], seconds: float = 90) -> None:
    """Until a job that does nothing is accepted: a young Ray answers before its job agent does."""
    deadline = time.monotonic() + seconds
    nothing = [*submit[: submit.index("--working-dir")], "--no-wait", "--", "true"]
    while subprocess.run(nothing, env=environment, capture_output=True, check=False).returncode:
        if time.monotonic() > deadline:
            raise InputError(f"Ray accepted no job within {seconds:.0f} s; run the same command again")
        time.sleep(2)


def recommend(config: Config, workspace: Workspace, k: int = 10) -> DemoResult:
    """Recommend by plain exact L2D-G for the first user who has a test sample."""
    dataset, store = Dataset.open(workspace), MemoryStore(workspace)
    titles = dataset.items()["title"].to_pylist()
    user, position = _first_test_sample(dataset)
    items = np.array(user["item_indices"], np.int32)
    snapshot = store.snapshot()
    backbone = load_backbone(config.model, snapshot.identity.dtype)
    encoder = PromptEncoder(config.prompt, backbone.tokenizer, titles)
    stops = np.array([position])
    prompts = encoder.encode(items, window_starts(stops, config.history.max_items, config.history.stride), stops)
    query = packed_states(backbone, Prompts.join(prompts), 512).states.numpy()
    sums, counts = np.zeros((len(titles), backbone.dimension)), np.zeros(len(titles), np.int64)
    for rows in store.read(snapshot):
        batch_sums, batch_counts = item_sums(hidden_states(rows), rows.column("item_index").to_numpy(), len(titles))
        sums, counts = sums + batch_sums, counts + batch_counts
    scores = global_scores(query, sums, counts)
    scores[:, items[:position]] = -np.inf
    best, _ = top_k(scores, k)
    return DemoResult(
        user=user["user_id"],
        history=[titles[item] for item in items[max(0, position - config.history.max_items) : position]],
        recommended=[titles[item] for item in best[0]],
        next=titles[items[position]],
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

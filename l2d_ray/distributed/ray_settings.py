"""Settings of the Ray that runs on this machine alone, and of Ray's libraries. This module imports none of them."""

import os

NICENESS = "RAY_worker_niceness"
"""Environment variable that a Ray reads when it starts."""

KEEP_IDLE_WORKERS = {"idle_worker_killing_time_threshold_ms": 600_000}
"""System setting of Ray, which by default ends workers that idle for a second: many short passes would start them again
and again."""

NO_REQUESTS_OF_RAY_DATA = {
    f"RAY_DATA_DEFAULT_CLUSTER_SCALING_UP_{kind}_UTIL_THRESHOLD": "1e9"
    for kind in ("CPU", "GPU", "MEMORY", "OBJECT_STORE_MEMORY")
}
"""Environment in which Ray Data asks the autoscaler for no nodes. Its requests ignore `workers.labels`, so that nodes
would start which no worker may use. The actors of a pool ask (`workers.actor_pool`)."""

LOCAL_VARIABLES = {
    # Ray's default of 15 leaves its workers a fifth of their speed next to one other busy program.
    NICENESS: "0",
    # Threads that wait for each other sleep. By default they spin, which costs most where cores are shared.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Workers keep the allocator that Ray loads into its other processes: jemalloc, set to keep freed buffers for a
    # minute. The C library returns large ones at once, so that every training step pays for their pages again.
    "RAY_LD_PRELOAD_ON_WORKERS": "1",
    "MALLOC_CONF": "thp:always,dirty_decay_ms:60000,muzzy_decay_ms:60000,oversize_threshold:0",
    # Ray Train starts no actor that asks whether nodes are to be preempted: the only node is this machine, and each
    # training would take 3 s of processor time more.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
"""Environment of a Ray on this machine alone. `jobs/RESULTS.md` has what it buys, in *Training*."""


def set_local_variables() -> None:
    """Set those variables that the environment does not. Call it before Ray starts."""
    for name, value in LOCAL_VARIABLES.items():
        os.environ.setdefault(name, value)

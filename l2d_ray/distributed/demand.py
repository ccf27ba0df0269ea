"""Demand for workers that a cluster has no room for yet, and the autoscaler's answer.

A placement group of one bundle asks for the room of one worker without starting a process. It ends with the driver, so
a killed job leaves no demand behind.
"""

import time

from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from l2d_ray.config import WorkersConfig
from l2d_ray.distributed.autoscaler import infeasible_groups
from l2d_ray.errors import InputError

PATIENCE = 20.0
"""Seconds for which the autoscaler must refuse a worker. It may do so for a moment while its nodes change."""


def gather(workers: WorkersConfig, wanted: int, at_least: int = 1, seconds: float = 0) -> int:
    """Ask the cluster for room for `wanted` workers; return how many have it after `seconds`, or once all have it.

    Waits longer until `at_least` have room. Raises InputError if there is room for none, and the autoscaler says that
    it has no node for one.
    """
    deadline, refused_since = time.monotonic() + seconds, None
    groups = [
        placement_group([workers.resources], bundle_label_selector=[workers.labels] if workers.labels else None)
        for _ in range(wanted)
    ]
    try:
        while True:
            found = sum(placement_group_table(group)["state"] == "CREATED" for group in groups)
            now = time.monotonic()
            if found == wanted or (found >= at_least and now >= deadline):
                return found
            refused = not found and groups[0].id.hex() in infeasible_groups()
            refused_since = (refused_since or now) if refused else None
            if refused_since and now - refused_since >= PATIENCE:
                labels = f", workers.labels={workers.labels}" if workers.labels else ""
                raise InputError(
                    f"workers.cpus={workers.cpus}, workers.gpus={workers.gpus:g}{labels}: the cluster's autoscaler can"
                    " start no node for such a worker; ask for less, or add a node type to the cluster"
                )
            time.sleep(1)
    finally:
        for group in groups:
            remove_placement_group(group)

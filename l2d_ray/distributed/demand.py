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

SETTLING = 3.0
"""Seconds that Ray may need to find the room that there is."""


def gather(workers: WorkersConfig, wanted: int, at_least: int = 1, seconds: float = 0) -> int:
    """Ask the cluster for room for `wanted` workers; return how many have it after `seconds`, or once all have it.

    Waits longer until `at_least` have room, and no longer if the autoscaler says that no more can come. Raises
    InputError if there is room for none then.
    """
    deadline, refused_since = time.monotonic() + max(seconds, SETTLING), None
    groups = [
        placement_group([workers.resources], bundle_label_selector=[workers.labels] if workers.labels else None)
        for _ in range(wanted)
    ]
    try:
        while True:
            waiting = [group for group in groups if placement_group_table(group)["state"] != "CREATED"]
            found, now = wanted - len(waiting), time.monotonic()
            refusals = infeasible_groups() if waiting else ""
            refused = all(group.id.hex() in refusals for group in waiting)
            refused_since = (refused_since or now) if refused else None
            is_last = refused_since is not None and now - refused_since >= PATIENCE
            if found == wanted or (found >= at_least and (now >= deadline or is_last)):
                return found
            if is_last and not found:
                labels = f", workers.labels={workers.labels}" if workers.labels else ""
                raise InputError(
                    f"workers.cpus={workers.cpus}, workers.gpus={workers.gpus:g}{labels}: the cluster's autoscaler can"
                    " start no node for such a worker; ask for less, or add a node type to the cluster"
                )
            time.sleep(1)
    finally:
        for group in groups:
            remove_placement_group(group)

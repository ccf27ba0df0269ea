"""Private names of Ray's autoscaler, as seen in Ray 2.60.0. Another version may lack any of them."""

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply


def infeasible_groups() -> str:
    """Return the hexadecimal ids of the placement groups for which autoscaler v2 can start no node, in one text.

    It is empty without an autoscaler, and with version 1, which does not tell.
    """
    client = GcsClient(ray.get_runtime_context().gcs_address)
    state = GetClusterStatusReply.FromString(client.get_cluster_status()).autoscaling_state
    return " ".join(gang.details for gang in state.infeasible_gang_resource_requests)

"""The files of cluster/ as an operator uses them: filled in by the commands of cluster/README.md."""

import os
import re
import subprocess
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.common_pb2 import LabelSelectorOperator

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
VALUES = {
    "ACCOUNT": "123456789012",
    "AMI_ID": "ami-03cf127a",
    "BUCKET": "some-bucket",
    "CPU_IMAGE": "projects/some-images/global/images/family/cpu",
    "GPU_IMAGE": "projects/some-images/global/images/family/gpu",
    "PROJECT": "some-project",
    "REGION": "us-west-2",
    "REGISTRY": "registry.example",
    "SECURITY_GROUP": "sg-0123456789abcdef0",
    "ZONE": "us-west-2b",
}
"""Values of the words in capitals."""
PLACEHOLDER = re.compile(rf"\b({'|'.join(VALUES)})\b")
Config = dict[str, Any]


def filling_commands() -> list[str]:
    """Return the commands of cluster/README.md that fill in the words in capitals."""
    text = (CLUSTER / "README.md").read_text()
    code = "".join(re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
    return [line for line in code.splitlines() if re.match(r"mkdir -p \w|.*\bsed .*cluster/|for .* in cluster/", line)]


def fill(folder: Path, values: Mapping[str, str] = VALUES) -> Path:
    """Run these commands in a folder, and return it."""
    (folder / "cluster").symlink_to(CLUSTER)
    for command in filling_commands():
        subprocess.run(
            ["bash", "-euc", command],
            cwd=folder,
            env=os.environ | values | {"STORE": f"s3://{values['BUCKET']}"},
            check=True,
        )
    return folder


def documents(file: Path) -> list[Config]:
    """Read the documents of a YAML file."""
    return list(yaml.safe_load_all(file.read_text()))


def launcher_config(file: Path) -> AutoscalingConfig:
    """Read a file of Ray's cluster launcher as its autoscaler does, which validates it."""
    return AutoscalingConfig(yaml.safe_load(file.read_text()), skip_content_hash=True)


def kuberay_config(cluster: Config) -> AutoscalingConfig:
    """Translate a RayCluster as the autoscaler in its head does, which validates it."""
    return AutoscalingConfig(_derive_autoscaling_config_from_ray_cr(cluster), skip_content_hash=True)


def nodes_to_start(
    config: AutoscalingConfig,
    demand: Mapping[str, float],
    count: int = 1,
    labels: Mapping[str, str] | None = None,
    exhausted: Collection[str] = (),
) -> Counter[str]:
    """Return the nodes that Ray's autoscaler starts in an empty cluster for a number of equal demands.

    Nodes of the `exhausted` types have lately not come up within the autoscaler's time limit.
    """
    equals = LabelSelectorOperator.LABEL_OPERATOR_IN
    selectors = [[(key, equals, [value]) for key, value in labels.items()]] if labels else None
    requests = [ResourceRequestUtil.make(dict(demand), label_selectors=selectors) for _ in range(count)]
    types = config.get_node_type_configs()
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=types,
            max_num_nodes=config.get_max_num_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count(requests),
            recoverable_resource_availabilities=dict.fromkeys(exhausted, 0.0),
        )
    )
    return Counter({request.instance_type: request.count for request in reply.to_launch})


def pod_templates(document: Config) -> Iterator[tuple[str, Config]]:
    """Yield the name and the pod template of each group of a KubeRay object, and of its submitter."""
    spec = document["spec"]
    cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    yield "head", cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]
    if "submitterPodTemplate" in spec:
        yield "submitter", spec["submitterPodTemplate"]

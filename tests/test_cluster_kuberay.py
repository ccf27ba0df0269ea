"""The objects of cluster/kuberay: operator's rules, Kubernetes' schemas, Ray's translation, and agreement of the files.

The operator itself and a Kubernetes cluster are not there; cluster/README.md names what nobody has tried.
"""

import copy
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from support.cluster_files import CLUSTER, PLACEHOLDER, documents, fill, kuberay_config, nodes_to_start, pod_templates
from support.kuberay_rules import broken_rules

from l2d_ray.command_line import load_config

KUBERNETES = "1.33"
CUSTOM = ("RayCluster", "RayJob", "RayService")
Config = dict[str, Any]


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Config]:
    folder = fill(tmp_path_factory.mktemp("filled")) / "kuberay"
    return [document for file in sorted(folder.glob("*.yaml")) for document in documents(file)]


@pytest.fixture(scope="module")
def named(objects: list[Config]) -> dict[str, Config]:
    return {document["kind"]: document for document in objects if document["kind"] in CUSTOM}


def clusters(named: dict[str, Config]) -> dict[str, Config]:
    keys = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
    return {kind: object["spec"].get(keys.get(kind), object["spec"]) for kind, object in named.items()}


def matches(selector: Config, labels: dict[str, str]) -> bool:
    return selector["matchLabels"].items() <= labels.items()


def test_the_files_hold_what_the_readme_names_and_no_word_to_fill_in(objects: list[Config]) -> None:
    kinds = {document["kind"] for document in objects}
    assert kinds == {"Namespace", "ServiceAccount", "NetworkPolicy", "PodDisruptionBudget", *CUSTOM}
    assert {document["metadata"].get("namespace", "l2d-ray") for document in objects} == {"l2d-ray"}
    assert not PLACEHOLDER.findall(yaml.safe_dump_all(objects))


def test_the_operator_accepts_them(named: dict[str, Config]) -> None:
    assert {kind: broken_rules(object) for kind, object in named.items()} == {kind: [] for kind in CUSTOM}


def _set(path: str, value: object) -> Callable[[Config], None]:
    """Return a change of an object: the value at a path of keys and positions."""

    def change(document: Config) -> None:
        *parents, last = [int(key) if key.isdecimal() else key for key in path.split("/")]
        place: Any = document
        for key in parents:
            place = place[key] if isinstance(key, int) else place.setdefault(key, {})
        place[last] = value

    return change


@pytest.mark.parametrize(
    ("kind", "path", "value", "rule"),
    [
        ("RayCluster", "metadata/name", "L2D", "no DNS label"),
        ("RayService", "metadata/name", "l" * 42, "too long"),
        ("RayCluster", "spec/rayVersion", "2.51.0", "a token needs rayVersion"),
        ("RayCluster", "spec/headGroupSpec/resources", {"cpu": "0"}, "sizes both in"),
        ("RayCluster", "spec/headGroupSpec/rayStartParams/num-cpus", 0, "are strings"),
        ("RayCluster", "spec/workerGroupSpecs/0/rayStartParams/labels", "a=b", "labels in rayStartParams"),
        ("RayCluster", "spec/workerGroupSpecs/0/labels/spot", "-yes-", "invalid label"),
        ("RayCluster", "spec/workerGroupSpecs/0/suspend", True, "suspended with autoscaling"),
        ("RayCluster", "spec/headGroupSpec/template/spec/restartPolicy", "Always", "must be Never"),
        ("RayJob", "spec/shutdownAfterJobFinishes", False, "ttlSecondsAfterFinished needs"),
        ("RayJob", "spec/deletionStrategy/deletionRules", [{}], "deletionRules exclude"),
        ("RayJob", "spec/clusterSelector", {"ray.io/cluster": "l2d-ray"}, "clusterSelector excludes"),
        ("RayJob", "spec/submissionMode", "InteractiveMode", "backoffLimit is not for"),
        ("RayJob", "spec/submissionMode", "SidecarMode", "no submitter"),
        ("RayJob", "spec/rayClusterSpec/authOptions/enableK8sTokenAuth", True, "not for RayJobs"),
        ("RayJob", "metadata/annotations", {}, "Kueue: autoscaling"),
        ("RayService", "spec/rayClusterConfig/authOptions/enableK8sTokenAuth", True, "not for RayServices"),
    ],
)
def test_a_broken_rule_is_found(named: dict[str, Config], kind: str, path: str, value: object, rule: str) -> None:
    document = copy.deepcopy(named[kind])
    _set(path, value)(document)
    assert any(rule in line for line in broken_rules(document))


def test_kubernetes_accepts_the_objects_and_the_pods(objects: list[Config]) -> None:
    for document in objects:
        if document["kind"] not in CUSTOM:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
            continue
        for _, template in pod_templates(document):
            kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **template}, KUBERNETES, strict=True)


def test_a_misspelt_field_of_a_pod_is_found(named: dict[str, Config]) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(dict(pod_templates(named["RayService"]))["gpu"])}
    pod["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinesProbe"):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_ray_starts_the_right_nodes(named: dict[str, Config]) -> None:
    config = kuberay_config(named["RayCluster"])
    worker = {"CPU": 7, "GPU": 1}
    assert nodes_to_start(config, {"CPU": 15}, 3) == {"cpu": 3}
    assert nodes_to_start(config, worker, 3) == {"gpu-spot": 3}
    assert nodes_to_start(config, worker, 3, exhausted=["gpu-spot"]) == {"gpu": 3}
    assert nodes_to_start(config, worker, labels={"ray.io/market-type": "on-demand"}) == {"gpu": 1}
    assert nodes_to_start(config, {"CPU": 1000}) == {}


def test_the_head_has_no_cpu_for_workers_and_every_pod_has_limits(named: dict[str, Config]) -> None:
    for cluster in clusters(named).values():
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert cluster["autoscalerOptions"]["version"] == "v2"
    for object in named.values():
        for _, template in pod_templates(object):
            (container,) = template["spec"]["containers"]
            sizes = container["resources"]
            assert sizes["limits"].keys() == sizes["requests"].keys() >= {"cpu", "memory"}
            assert sizes["limits"]["memory"] == sizes["requests"]["memory"]


def test_pods_run_without_privileges_and_with_their_service_account(
    named: dict[str, Config], objects: list[Config]
) -> None:
    accounts = {document["metadata"]["name"] for document in objects if document["kind"] == "ServiceAccount"}
    for object in named.values():
        for name, template in pod_templates(object):
            pod = template["spec"]
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["runAsUser"] == 1000
            assert pod["containers"][0]["securityContext"]["allowPrivilegeEscalation"] is False
            role = "head" if name == "head" else "worker"
            assert pod.get("serviceAccountName") == (None if name == "submitter" else f"l2d-ray-{role}")
            assert {pod["serviceAccountName"]} <= accounts if name != "submitter" else True


def test_versions_and_images_are_those_of_the_dockerfile(named: dict[str, Config]) -> None:
    (ray,) = re.findall(r"^ray==(.+)$", (CLUSTER / "constraints.txt").read_text(), re.MULTILINE)
    assert {cluster["rayVersion"] for cluster in clusters(named).values()} == {ray}
    for object in named.values():
        for name, template in pod_templates(object):
            variant = "gpu" if name.startswith("gpu") else "cpu"
            assert template["spec"]["containers"][0]["image"] == f"registry.example/l2d_ray:{variant}"


def test_policies_and_budgets_select_the_pods(named: dict[str, Config], objects: list[Config]) -> None:
    pods = {
        (kind, name): template["metadata"]["labels"]
        for kind, object in named.items()
        for name, template in pod_templates(object)
    }
    selectors = {
        document["metadata"]["name"]: document["spec"].get("podSelector") or document["spec"]["selector"]
        for document in objects
        if document["kind"] in ("NetworkPolicy", "PodDisruptionBudget")
    }
    chosen = {name: {pod for pod, labels in pods.items() if matches(s, labels)} for name, s in selectors.items()}
    heads = {(kind, "head") for kind in CUSTOM}
    assert chosen == {
        "l2d-ray-nodes": {*pods},
        "l2d-ray-metrics": {*pods},
        "l2d-ray-heads": heads,
        "l2d-ray-clients": {("RayService", "head"), ("RayService", "gpu")},
        "l2d-ray-endpoint": {("RayService", "gpu")},
    }


def test_budgets_are_of_the_kind_that_works_for_the_pods_of_an_operator(objects: list[Config]) -> None:
    budgets = [document["spec"] for document in objects if document["kind"] == "PodDisruptionBudget"]
    assert all(isinstance(budget["minAvailable"], int) and "maxUnavailable" not in budget for budget in budgets)


def test_pods_reach_dns_the_bucket_and_heads_the_api_server(objects: list[Config]) -> None:
    policies = {document["metadata"]["name"]: document for document in objects if document["kind"] == "NetworkPolicy"}
    open_to = {
        name: {
            (to.get("ipBlock", {}).get("cidr"), port["protocol"], port["port"])
            for rule in policy["spec"].get("egress", [])
            for to in rule["to"]
            for port in rule.get("ports", [])
        }
        for name, policy in policies.items()
    }
    assert {(None, "UDP", 53), (None, "TCP", 53), ("0.0.0.0/0", "TCP", 443)} <= open_to["l2d-ray-nodes"]
    assert {("0.0.0.0/0", "TCP", 443), ("0.0.0.0/0", "TCP", 6443)} == open_to["l2d-ray-heads"]


def test_the_endpoint_is_that_of_serve_yaml_for_other_pods(named: dict[str, Config]) -> None:
    served = yaml.safe_load(named["RayService"]["spec"]["serveConfigV2"])
    expected = yaml.safe_load((CLUSTER / "serve.yaml").read_text())
    ServeDeploySchema.model_validate(served)
    assert served["http_options"].pop("host") == "0.0.0.0"
    expected["http_options"].pop("host")
    for config in (served, expected):
        arguments = config["applications"][0]["args"]
        assert arguments.pop("workspace").startswith("s3://")
        assert arguments["model"].pop("adapter")
    assert served == expected


def test_nodes_of_the_endpoint_set_haproxy_up_and_know_the_keys(named: dict[str, Config]) -> None:
    service = named["RayService"]
    assert service["metadata"]["annotations"]["ray.io/overwrite-container-cmd"] == "true"
    for _, template in pod_templates(service):
        (container,) = template["spec"]["containers"]
        (command,) = container["args"]
        assert shlex.split(command)[-1] == "$KUBERAY_GEN_RAY_START_CMD"
        assert 'eval "$(python -m l2d_ray.distributed.serving.haproxy)"' in command
        assert [variable["name"] for variable in container["env"]] == ["L2D_RAY_KEYS"]


def test_the_job_is_one_that_l2d_ray_accepts(named: dict[str, Config]) -> None:
    python, script, *arguments = shlex.split(named["RayJob"]["spec"]["entrypoint"])
    assert (python, Path(script).parent.name) == ("python", "jobs")
    assert (CLUSTER.parent / "jobs" / Path(script).name).exists()
    assert load_config(arguments).workers.gpus == 1

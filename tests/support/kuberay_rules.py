"""Rules that KubeRay's operator checks beyond its CRDs, after `utils/validation.go` (v1.7), and Kueue's for RayJobs.

An object that breaks one is accepted by the API server, and then reported as invalid and left alone.
"""

import re
from collections.abc import Iterator
from typing import Any

from packaging.version import Version

Config = dict[str, Any]
LENGTHS = {"RayCluster": 50, "RayJob": 47, "RayService": 41}
"""Longest names. `generateName` adds five characters."""
DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL = re.compile(r"([a-zA-Z0-9]([-\w.]{0,61}[a-zA-Z0-9])?)?")
SIZES = ("num-cpus", "num-gpus", "memory", "resources")
QUEUE, ELASTIC = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/elastic-job"


def broken_rules(document: Config) -> list[str]:
    """Return a line for each rule that a RayCluster, RayJob or RayService breaks."""
    kind, spec = document["kind"], document["spec"]
    found = list(_names(document))
    match kind:
        case "RayCluster":
            found += _cluster(spec)
        case "RayJob":
            found += _job(document)
        case "RayService":
            cluster = spec["rayClusterConfig"]
            found += _cluster(cluster)
            if cluster.get("authOptions", {}).get("enableK8sTokenAuth"):
                found.append("enableK8sTokenAuth is not for RayServices")
            if cluster["headGroupSpec"].get("headService", {}).get("metadata", {}).get("name"):
                found.append("headService must have no name")
            if spec.get("rayClusterDeletionDelaySeconds", 0) < 0:
                found.append("rayClusterDeletionDelaySeconds is negative")
    return found


def _names(document: Config) -> Iterator[str]:
    metadata = document["metadata"]
    name = metadata.get("name") or metadata["generateName"] + "x" * 5
    if len(name) > LENGTHS[document["kind"]]:
        yield f"name {name} is too long"
    if not DNS_LABEL.fullmatch(name):
        yield f"name {name} is no DNS label"


def _cluster(spec: Config) -> Iterator[str]:
    head = spec["headGroupSpec"]
    for name, group in [("head", head), *((group["groupName"], group) for group in spec["workerGroupSpecs"])]:
        parameters = group.get("rayStartParams", {})
        if not group["template"]["spec"]["containers"]:
            yield f"{name}: no container"
        if group.get("resources") and any(parameters.get(size) for size in SIZES):
            yield f"{name}: sizes both in resources and in rayStartParams"
        if "labels" in parameters:
            yield f"{name}: labels in rayStartParams"
        if not all(LABEL.fullmatch(value) for value in group.get("labels", {}).values()):
            yield f"{name}: invalid label"
        if any(not isinstance(value, str) for value in parameters.values()):
            yield f"{name}: rayStartParams are strings"
    yield from _autoscaling(spec)
    if spec.get("authOptions", {}).get("mode") == "token" and Version(spec.get("rayVersion", "0")) < Version("2.52"):
        yield "a token needs rayVersion 2.52 or later"


def _autoscaling(spec: Config) -> Iterator[str]:
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    variables = {v["name"] for v in groups[0]["template"]["spec"]["containers"][0].get("env", [])}
    version = spec.get("autoscalerOptions", {}).get("version")
    if "RAY_enable_autoscaler_v2" in variables and (version or not spec.get("enableInTreeAutoscaling")):
        yield "the autoscaler's version is set twice, or without autoscaling"
    if not spec.get("enableInTreeAutoscaling"):
        return
    if any(group.get("suspend") for group in groups):
        yield "a group is suspended with autoscaling"
    if version == "v2" and any(group["template"]["spec"].get("restartPolicy", "Never") != "Never" for group in groups):
        yield "restartPolicy must be Never with autoscaler v2"


def _job(document: Config) -> Iterator[str]:
    spec = document["spec"]
    cluster, mode = spec.get("rayClusterSpec"), spec.get("submissionMode", "K8sJobMode")
    shutdown, selector = spec.get("shutdownAfterJobFinishes"), spec.get("clusterSelector")
    rules, retries = spec.get("deletionStrategy", {}).get("deletionRules"), spec.get("backoffLimit", 0)
    checks = {
        "suspend needs shutdownAfterJobFinishes": spec.get("suspend") and not shutdown,
        "ttlSecondsAfterFinished needs shutdownAfterJobFinishes": spec.get("ttlSecondsAfterFinished") and not shutdown,
        "deletionRules exclude shutdownAfterJobFinishes": rules and shutdown,
        "clusterSelector excludes suspend and backoffLimit": selector and (spec.get("suspend") or retries),
        "either rayClusterSpec or clusterSelector": not cluster and not selector,
        "backoffLimit is not for InteractiveMode": mode == "InteractiveMode" and retries,
        "SidecarMode has no submitter": mode == "SidecarMode" and {"submitterPodTemplate", "submitterConfig"} & {*spec},
        "limits are positive": min(spec.get("activeDeadlineSeconds", 1), retries + 1) <= 0,
    }
    yield from (rule for rule, broken in checks.items() if broken)
    if cluster:
        yield from _cluster(cluster)
        if cluster.get("authOptions", {}).get("enableK8sTokenAuth"):
            yield "enableK8sTokenAuth is not for RayJobs"
    yield from _queue(document)


def _queue(document: Config) -> Iterator[str]:
    spec, metadata = document["spec"], document["metadata"]
    cluster = spec.get("rayClusterSpec") or {}
    if QUEUE not in metadata.get("labels", {}):
        return
    if not spec.get("shutdownAfterJobFinishes"):
        yield "Kueue: needs shutdownAfterJobFinishes"
    if cluster.get("enableInTreeAutoscaling") and metadata.get("annotations", {}).get(ELASTIC) != "true":
        yield "Kueue: autoscaling needs an elastic job"
    if len(cluster.get("workerGroupSpecs", [])) > 7:
        yield "Kueue: more than 7 groups of workers"

"""The files of the launcher: Ray's loader, schema and autoscaler, a simulated EC2, the schema of Compute Engine."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import pytest
import yaml
from googleapiclient.discovery_cache import get_static_doc
from moto import mock_aws
from moto.ec2.models.instance_types import INSTANCE_TYPES
from ray.autoscaler._private import commands
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent
from support.cluster_files import CLUSTER, PLACEHOLDER, VALUES, fill, launcher_config, nodes_to_start

Config = dict[str, Any]
ON_DEMAND, SPOT = ({"ray.io/market-type": kind} for kind in ("on-demand", "spot"))
both = pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
sizes = pytest.mark.parametrize(("name", "cpus", "worker_cpus"), [("aws.yaml", 16, 8), ("gcp.yaml", 22, 8)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("filled"))


def load(file: Path) -> Config:
    """Read a file as `ray up` does."""
    config: Config = prepare_config(yaml.safe_load(file.read_text()))
    validate_config(config)
    return config


@both
def test_ray_accepts_the_file_without_its_own_defaults(folder: Path, name: str) -> None:
    text = (folder / name).read_text()
    config, given = load(folder / name), yaml.safe_load(text)
    assert not PLACEHOLDER.search(text)
    assert not {"head_node", "worker_nodes", "min_workers"} & given.keys()
    for key in ("setup_commands", "head_setup_commands", "worker_setup_commands", "head_start_ray_commands"):
        assert key in given
    assert "0.0.0.0" not in json.dumps(config)
    assert "ray-wheels" not in json.dumps(config)
    assert config["docker"]["image"].startswith(VALUES["REGISTRY"])


@both
def test_ray_refuses_a_misspelt_field(folder: Path, name: str) -> None:
    config = yaml.safe_load((folder / name).read_text())
    config["available_node_types"]["gpu"]["idle_timeout"] = 1
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config(prepare_config(config))


@both
def test_every_node_sets_up_the_pinned_versions_and_the_token(folder: Path, name: str) -> None:
    config = load(folder / name)
    (setup,) = config["worker_setup_commands"]
    assert config["head_setup_commands"] == [setup]
    assert "--constraint cluster/constraints.txt" in setup
    options = " ".join(config["docker"]["run_options"])
    (path,) = re.findall(r"RAY_AUTH_TOKEN_PATH=(\S+)/auth_token", options)
    assert "RAY_AUTH_MODE=token" in options
    assert config["file_mounts"] == {path.replace("/home/ray", "~"): path.replace("/home/ray", "~")}
    start = config["head_start_ray_commands"][-1]
    assert "--num-cpus=0" in start
    assert "--dashboard-host=127.0.0.1" in start
    for command in (start, config["worker_start_ray_commands"][-1]):
        assert command.index("l2d_ray.distributed.serving.haproxy") < command.index("ray start")


@pytest.fixture(scope="module")
def aws(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    """Prepare a simulated account as cluster/README.md does, and yield what `ray up` makes of the file."""
    home = tmp_path_factory.mktemp("home")
    (home / ".ray_token").mkdir()
    text = (folder / "aws.yaml").read_text()
    with pytest.MonkeyPatch.context() as patch, mock_aws():
        for key, value in {"AWS_DEFAULT_REGION": VALUES["REGION"], "HOME": str(home), "TMPDIR": str(home)}.items():
            patch.setenv(key, value)
        patch.setattr("tempfile.tempdir", str(home))  # where Ray keeps the answers of EC2
        for other in INSTANCE_TYPES.keys() - set(re.findall(r"InstanceType: (\S+)", text)):
            patch.delitem(INSTANCE_TYPES, other)  # the simulation takes 10 seconds to list all of them
        iam, ec2 = boto3.client("iam"), boto3.client("ec2")
        for role in ("l2d-ray-head", "l2d-ray-worker"):
            iam.create_role(RoleName=role, AssumeRolePolicyDocument=(folder / "filled/trust.json").read_text())
            for policy in ("workspace", *["head"] * role.endswith("head")):
                document = (folder / f"filled/{policy}-policy.json").read_text()
                iam.put_role_policy(RoleName=role, PolicyName=policy, PolicyDocument=document)
            iam.create_instance_profile(InstanceProfileName=role)
            iam.add_role_to_instance_profile(InstanceProfileName=role, RoleName=role)
        group = ec2.create_security_group(GroupName="l2d-ray", Description="l2d_ray")["GroupId"]
        config = yaml.safe_load(text.replace(VALUES["SECURITY_GROUP"], group))
        bootstrapped: Config = commands._bootstrap_config(config, no_config_cache=True)
        yield bootstrapped


def test_ray_finds_the_sizes_of_ec2_and_makes_no_role_or_group(aws: Config) -> None:
    types = aws["available_node_types"]
    assert {name: (one["resources"]["CPU"], one["resources"].get("GPU", 0)) for name, one in types.items()} == {
        "head": (0, 0),
        "cpu": (16, 0),
        "gpu-spot": (8, 1),
        "gpu": (8, 1),
    }
    assert aws["head_node"] == {}
    roles = [role["RoleName"] for role in boto3.client("iam").list_roles()["Roles"]]
    assert not [role for role in roles if role.startswith("ray-")]
    groups = boto3.client("ec2").describe_security_groups()["SecurityGroups"]
    assert {group["GroupName"] for group in groups} == {"default", "l2d-ray"}


@pytest.mark.parametrize("name", ["head", "cpu", "gpu-spot", "gpu"])
def test_ec2_starts_a_node_of_each_type(aws: Config, name: str) -> None:
    provider = AWSNodeProvider(aws["provider"], aws["cluster_name"])
    kind = aws["available_node_types"][name]
    tags = {"ray-node-name": name, "ray-node-type": "worker", "ray-user-node-type": name, "ray-node-status": "pending"}
    created = provider.create_node_with_resources_and_labels(
        kind["node_config"], tags, 1, kind["resources"], kind["labels"]
    )
    (instance,) = boto3.resource("ec2").instances.filter(InstanceIds=[*created])
    role = "head" if name == "head" else "worker"
    assert instance.iam_instance_profile["Arn"].endswith(f"/l2d-ray-{role}")
    assert instance.instance_lifecycle == ("spot" if name == "gpu-spot" else None)
    assert kind["labels"] == (SPOT if name == "gpu-spot" else ON_DEMAND)
    assert [group["GroupName"] for group in instance.security_groups] == ["l2d-ray"]
    assert {"Key": "ray-cluster-name", "Value": "l2d-ray"} in instance.tags
    image = AutoscalingConfig(aws, skip_content_hash=True).get_docker_config(name)["image"]
    assert image == f"registry.example/l2d_ray:{'gpu' if name.startswith('gpu') else 'cpu'}"


@sizes
def test_ray_starts_the_right_nodes(aws: Config, folder: Path, name: str, cpus: int, worker_cpus: int) -> None:
    config = AutoscalingConfig(aws, skip_content_hash=True) if name == "aws.yaml" else launcher_config(folder / name)
    worker = {"CPU": worker_cpus, "GPU": 1}
    assert nodes_to_start(config, {"CPU": cpus}, 3) == {"cpu": 3}
    assert nodes_to_start(config, {"CPU": 1}) == {"cpu": 1}
    assert nodes_to_start(config, worker, 3) == {"gpu-spot": 3}
    assert nodes_to_start(config, worker, 10) == {"gpu-spot": 8, "gpu": 2}
    assert nodes_to_start(config, worker, labels=ON_DEMAND) == {"gpu": 1}
    assert nodes_to_start(config, worker, labels=SPOT, exhausted=["gpu-spot"]) == {"gpu-spot": 1}
    assert nodes_to_start(config, worker, 3, exhausted=["gpu-spot"]) == {"gpu": 3}
    assert nodes_to_start(config, worker | {"GPU": 2}) == {}
    assert nodes_to_start(config, worker, labels={"ray.io/market-type": "reserved"}) == {}


def test_ray_forgets_a_refusal_of_the_cloud_but_not_a_time_out() -> None:
    """A change of this in Ray makes cluster/README.md wrong, in the paragraph about spot nodes."""
    monitor = CloudResourceMonitor()
    monitor.notify([InstanceUpdateEvent(instance_type="gpu", new_instance_status=Instance.ALLOCATION_FAILED)])
    assert monitor.get_recoverable_resource_availabilities() == {}
    monitor.notify([InstanceUpdateEvent(instance_type="gpu", new_instance_status=Instance.ALLOCATION_TIMEOUT)])
    assert monitor.get_recoverable_resource_availabilities() == {"gpu": 0}


def differences(value: object, schema: Config, schemas: Config, path: str = "") -> Iterator[str]:
    """Yield where a value differs from a schema of a Google discovery document."""
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    match schema.get("type"), value:
        case "object", dict():
            fields = schema.get("properties", {})
            for key, one in value.items():
                if inner := fields.get(key, schema.get("additionalProperties")):
                    yield from differences(one, inner, schemas, f"{path}/{key}")
                else:
                    yield f"{path}/{key}: unknown"
        case "array", list():
            for one in value:
                yield from differences(one, schema["items"], schemas, f"{path}/[]")
        case "string", str():
            if "enum" in schema and value not in schema["enum"]:
                yield f"{path}: {value} is none of {schema['enum']}"
        case ("string", int()) if schema.get("format") == "int64" and not isinstance(value, bool):
            pass
        case ("boolean", bool()) | ("integer", int()):
            pass
        case kind, _:
            yield f"{path}: {value!r} is no {kind}"


@pytest.fixture(scope="module")
def compute() -> Config:
    schemas: Config = json.loads(get_static_doc("compute", "v1"))["schemas"]
    return schemas


def test_compute_engine_knows_the_fields_of_every_node(folder: Path, compute: Config) -> None:
    types = load(folder / "gcp.yaml")["available_node_types"]
    found = {name: list(differences(one["node_config"], compute["Instance"], compute)) for name, one in types.items()}
    assert found == {"head": [], "cpu": [], "gpu-spot": [], "gpu": []}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheduling": [{"preemptible": True}]}, "is no object"),  # as in Ray's own defaults
        ({"scheduling": {"provisioningModel": "CHEAP"}}, "is none of"),
        ({"machinetype": "n2-standard-4"}, "/machinetype: unknown"),
        ({"disks": [{"boot": "yes"}]}, "is no boolean"),
    ],
)
def test_a_wrong_field_of_a_node_is_found(compute: Config, change: Config, message: str) -> None:
    (found,) = differences(change, compute["Instance"], compute)
    assert message in found


def test_nodes_of_compute_engine_have_the_roles_and_the_network_of_the_readme(folder: Path) -> None:
    text = (CLUSTER / "README.md").read_text()
    for name, one in load(folder / "gcp.yaml")["available_node_types"].items():
        node = one["node_config"]
        (account,), (network,) = node["serviceAccounts"], node["networkInterfaces"]
        assert account["email"].partition("@")[0] == f"l2d-ray-{'head' if name == 'head' else 'worker'}"
        assert f"subnets create {network['subnetwork'].rpartition('/')[2]} " in text
        assert f"--target-tags={node['tags']['items'][0]}" in text
        assert (node.get("scheduling", {}).get("provisioningModel") == "SPOT") == (name == "gpu-spot")


def test_s3_accepts_the_policies_of_the_bucket(folder: Path) -> None:
    with mock_aws():
        s3, bucket = boto3.client("s3", region_name=VALUES["REGION"]), VALUES["BUCKET"]
        s3.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": VALUES["REGION"]})
        s3.put_bucket_policy(Bucket=bucket, Policy=(folder / "filled/bucket-policy.json").read_text())
        rules = json.loads((folder / "filled/lifecycle.json").read_text())
        s3.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration=rules)
        kept = s3.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]
    assert {"DaysAfterInitiation": 7} in [rule.get("AbortIncompleteMultipartUpload") for rule in kept]


def test_cloud_storage_knows_the_lifecycle_rules() -> None:
    schemas = json.loads(get_static_doc("storage", "v1"))["schemas"]
    rules = json.loads((CLUSTER / "gcp/lifecycle.json").read_text())
    assert list(differences(rules, schemas["Bucket"]["properties"]["lifecycle"], schemas)) == []
    assert "AbortIncompleteMultipartUpload" in [rule["action"]["type"] for rule in rules["rule"]]

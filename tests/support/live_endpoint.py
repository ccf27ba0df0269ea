"""The application on a real socket: uvicorn in a thread of this process, or in a separate process."""

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import uvicorn

from l2d_ray.config import ServeConfig
from l2d_ray.serve.api import create_app
from l2d_ray.serve.security import Keys
from support.small_endpoint import LocalEngine, write_endpoint

LIMITS = ServeConfig(max_history=50, max_title_chars=200, max_filter_items=100, max_batch=3, deadline_seconds=5)


def application(engine: LocalEngine, settings: ServeConfig = LIMITS, keys: str = "NO_SUCH_VARIABLE") -> Any:
    """Return the application over `engine`; `keys` names the environment variable that holds the keys."""
    return create_app(engine, settings, Keys(keys))


def _server(app: Any) -> tuple[uvicorn.Server, socket.socket]:
    config = uvicorn.Config(app, lifespan="off", access_log=False, log_level="critical", timeout_graceful_shutdown=1)
    return uvicorn.Server(config), socket.create_server(("127.0.0.1", 0), backlog=1024)


def _url(listener: socket.socket) -> str:
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextlib.contextmanager
def started(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Serve a new small workspace from a separate process; give its URL and the process."""
    command = [sys.executable, "-m", "support.live_endpoint", str(folder)]
    tests = Path(__file__).parents[1]
    with subprocess.Popen(command, cwd=tests, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            lines = (line.strip() for line in process.stdout)  # libraries may print lines first
            yield next(line for line in lines if line.startswith("http://")), psutil.Process(process.pid)
        finally:
            process.kill()


@contextlib.contextmanager
def listening(app: Any) -> Iterator[str]:
    """Serve on a free port of this machine; give the URL."""
    server, listener = _server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield _url(listener)
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


if __name__ == "__main__":  # argument: the folder of the workspace to write and serve; prints its URL
    server, listener = _server(application(LocalEngine(write_endpoint(Path(sys.argv[1])))))
    print(_url(listener), flush=True)
    server.run(sockets=[listener])

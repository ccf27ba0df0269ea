"""The frame of every script in `jobs/`: configuration, Ray, a quiet screen, the result line and the exit status."""

import dataclasses
import json
import logging
import os
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from l2d_ray.command_line import load_config
from l2d_ray.config import Config
from l2d_ray.distributed.ray_settings import KEEP_IDLE_WORKERS, NO_REQUESTS_OF_RAY_DATA, set_local_variables
from l2d_ray.distributed.screen import quiet_libraries
from l2d_ray.errors import InputError, input_error_in, one_line

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable that Ray sets in a submitted job."""


def run(
    stage: str,
    about: str | None = None,
    reads: str = "",
    check: str | None = None,
    on_ray: bool = True,
    serves: bool = False,
) -> NoReturn:
    """Run one stage as a process: `--config FILE [key=value …]` in, one JSON object as the last line on stdout out.

    `stage` is `module:function`, from a Config to a dataclass. Its module is imported after the command line has been
    checked, because the libraries behind it take seconds to load. `check`, from a Config, raises InputError for what
    can be known before Ray starts. `about`, and the sections and keys that the stage `reads`, are for `--help`. Without
    `on_ray` the stage starts Ray itself (`connect`) if it has something to do on it. A stage that `serves` needs a Ray
    that is prepared for HTTP.

    Exit status 0: done. 2: bad input or configuration, with one line on stderr. 1: a full disk, a missing permission
    and the like, with one line; any other error, with a traceback. 130: interrupted from the keyboard, with one line.
    """
    try:
        config = load_config(sys.argv[1:], reads.split(), about or "", temporary_folder=_SUBMITTED in os.environ)
        from l2d_ray.distributed.busy import warn_if_busy  # after --help, which they would make wait
        from l2d_ray.workspace import Workspace

        with quiet_libraries(Path(sys.argv[0]).stem), warn_if_busy():
            if "workspace" in reads.split() and not serves:  # an endpoint may serve what it must not write to
                Workspace.open(config.workspace).check()
            if check:
                pkgutil.resolve_name(check)(config)
            os.environ |= NO_REQUESTS_OF_RAY_DATA  # before Ray Data is imported
            with _disconnected_at_the_end():
                if on_ray:
                    connect(config, serves)
                result: DataclassInstance = pkgutil.resolve_name(stage)(config)
    except InputError as error:
        _fail(2, str(input_error_in(str(error)) or error))  # the message of a replica's error is its whole traceback
    except KeyboardInterrupt:
        _fail(130, "interrupted; run the same command again to go on")
    except OSError as error:
        _fail(1, f"{error}; correct that and run the same command again")
    except Exception as error:
        from ray.exceptions import RayError

        cause = root_error(error) if isinstance(error, RayError) else error
        if cause is error:
            raise
        if isinstance(cause, InputError):
            _fail(2, str(cause))
        _fail(1, f"{cause}; correct that and run the same command again")
    print(json.dumps(dataclasses.asdict(result)))
    sys.exit(0)


def joins_a_cluster() -> bool:
    """Return whether the environment names a Ray cluster to join, which may grow."""
    return _SUBMITTED in os.environ or "RAY_ADDRESS" in os.environ


def connect(config: Config, serves: bool = False) -> None:
    """Join the Ray cluster of the environment (`ray job submit`, RAY_ADDRESS), or start one on this machine.

    Does nothing if this process has a connection already. Raises TimeoutError if Ray does not start in time.
    """
    import ray  # not above: it takes a second, and wrong settings are refused without it

    quiet_ray_data()
    if ray.is_initialized():
        return
    if joins_a_cluster():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
        return
    set_local_variables()
    if serves:
        from l2d_ray.distributed.serving.haproxy import local_variables

        os.environ |= local_variables(config.serve)
    try:
        ray.init(
            "local",  # never another Ray that runs on this machine
            # More logical CPUs than cores: a pool of actors must leave room for tasks, and the models of an endpoint
            # for its gateways and shards, which take a tenth of a CPU each.
            num_cpus=max(4, os.cpu_count() or 1) + 1,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _system_config=KEEP_IDLE_WORKERS,
        )
    except Exception as error:
        if "timed out during startup" not in str(error):  # a bare Exception, at Ray 2.60
            raise
        raise TimeoutError(
            "Ray did not start within 30 s: this machine is too busy, or too little memory is free"
        ) from None


def _is_connected() -> bool:
    """Return whether this process has a connection to Ray. Does not import it."""
    ray: Any = sys.modules.get("ray")
    return bool(ray and ray.is_initialized())


@contextmanager
def _disconnected_at_the_end() -> Iterator[None]:
    """Close a connection to Ray that the block made."""
    connected = _is_connected()
    try:
        yield
    finally:
        if _is_connected() and not connected:
            import ray

            ray.shutdown()


def quiet_ray_data() -> None:
    """Turn off the plans, progress bars and error logs of Ray Data; the job reports progress and errors itself."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    # At Ray 2.60 it is the only way to limit the retries of a task (build_memory).
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")


def root_error(error: Exception) -> Exception:
    """Return the InputError or OSError of a worker in the text of Ray's `error`, or `error` itself if there is none.

    Ray Data raises a UserCodeException that holds the original exception as text only.
    """
    text = str(error)
    if raised := input_error_in(text):
        return raised
    system = re.search(r"^(?:OSError|PermissionError|FileNotFoundError): (.+)$", text, re.MULTILINE)
    return OSError(system[1]) if system else error


def _fail(status: int, message: str) -> NoReturn:
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(status)

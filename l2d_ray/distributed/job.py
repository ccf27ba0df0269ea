"""What every script in `jobs/` does around its one stage: configuration, Ray, the result line and the exit status."""

import dataclasses
import json
import logging
import os
import pkgutil
import re
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from l2d_ray.command_line import load_config
from l2d_ray.config import Config
from l2d_ray.distributed.serving.haproxy import local_variables
from l2d_ray.errors import InputError, input_error_in, one_line

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set in a submitted job."""


def run(
    stage: str, about: str | None = None, reads: Sequence[str] = (), check: str | None = None, on_ray: bool = True
) -> NoReturn:
    """Run one stage as a process: `--config FILE [key=value …]` in, one JSON object as the last line on stdout out.

    The stage is `module:function`, from a Config to a dataclass, imported once the command line is known to be right:
    the libraries behind it take seconds. So is `check`, from a Config to nothing, which raises InputError for what can
    be known without Ray. `about` and the settings that the stage `reads` are for `--help`.

    Exit status: 0 done; 2 bad input or configuration and 1 no space, no permission and the like, both with one line on
    stderr; 1 with a traceback for anything else.
    """
    try:
        temporary_folder = _SUBMITTED in os.environ
        config = load_config(sys.argv[1:], reads, about or "", temporary_folder)
        if check:
            pkgutil.resolve_name(check)(config)
        if on_ray:
            connect(config)
        result: DataclassInstance = pkgutil.resolve_name(stage)(config)
    except InputError as error:
        _fail(2, str(input_error_in(str(error)) or error))  # of a replica's, str is its whole traceback
    except OSError as error:
        _fail(1, f"{error}; mend that and run the same command again")
    except Exception as error:
        from ray.exceptions import RayError

        cause = root_error(error) if isinstance(error, RayError) else error
        if cause is error:
            raise
        hint = "" if isinstance(cause, InputError) else "; mend that and run the same command again"
        _fail(2 if isinstance(cause, InputError) else 1, f"{cause}{hint}")
    if on_ray:
        import ray

        ray.shutdown()  # it may yet print what befell its workers, and the result is the last line
    print(json.dumps(dataclasses.asdict(result)))
    sys.exit(0)


def joins_a_cluster() -> bool:
    """Whether the environment names a Ray to join, which may grow."""
    return _SUBMITTED in os.environ or "RAY_ADDRESS" in os.environ


def connect(config: Config) -> None:
    """Join the Ray cluster of the environment (`ray job submit`, RAY_ADDRESS), or start one on this machine."""
    import ray  # not above: it takes a second, and wrong settings are refused without it

    quiet()
    if ray.is_initialized():
        return
    if joins_a_cluster():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
        return
    os.environ |= local_variables(config.serve)
    # More logical CPUs than a small machine has: a pool of actors must not starve the tasks beside it, nor the models
    # of an endpoint its gateways and shards, which take a tenth each.
    ray.init(
        "local",  # or it would join whatever Ray runs on this machine
        num_cpus=max(4, os.cpu_count() or 1) + 1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        # Ray ends workers that idle for a second, and a stage of many short passes would start them again and again.
        _system_config={"idle_worker_killing_time_threshold_ms": 600_000},
    )


def quiet() -> None:
    """Keep Ray's plans, progress and tracebacks in its log files; the job says what matters."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    # The only way, at Ray 2.60, to bound the retries of a task (build_memory).
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")


def root_error(error: Exception) -> Exception:
    """The InputError or OSError that a worker raised, as far as Ray's `error` tells; else `error` itself.

    Ray Data raises a UserCodeException that holds the original exception as text only.
    """
    text = str(error)
    if ours := input_error_in(text):
        return ours
    system = re.search(r"^(?:OSError|PermissionError|FileNotFoundError): (.+)$", text, re.MULTILINE)
    return OSError(system[1]) if system else error


def _fail(status: int, message: str) -> NoReturn:
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(status)

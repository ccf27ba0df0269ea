"""Stages that print like libraries do, on every way to the screen, and then end in one way or another."""

import logging
import os
import subprocess
import warnings
from dataclasses import dataclass

import numpy as np
import ray

from l2d_ray.config import Config
from l2d_ray.distributed.screen import say, show
from l2d_ray.errors import InputError


@dataclass(frozen=True)
class NoisyResult:
    """The environment variables of Ray Serve that the stage saw."""

    serve: list[str]


@ray.remote(num_cpus=0)
class Actor:
    def __init__(self, array: np.ndarray) -> None:
        self.size = array.size

    def get(self) -> int:
        return self.size


def noise() -> None:
    os.write(1, b"noise of C++ on stdout\n")
    os.write(2, b"noise of C++ on stderr\n")
    print("noise of a library")
    warnings.warn("noise of a warning", stacklevel=1)
    logging.getLogger("library").warning("noise of a logger")
    subprocess.run("echo noise of a child; echo noise of a child >&2", shell=True, check=True)


def good(_config: Config) -> NoisyResult:
    noise()
    say("progress")
    show("a table")
    logging.getLogger("l2d_ray.data").info("a message")
    return NoisyResult(sorted(name for name in os.environ if name.startswith("RAY_SERVE")))


def with_actor(config: Config) -> NoisyResult:
    """Provoke a line about the actor's argument, which Ray's core writes straight to the descriptor of stderr."""
    actor = Actor.options(max_restarts=1)  # type: ignore[attr-defined]
    assert ray.get(actor.remote(ray.put(np.zeros(1 << 20))).get.remote()) == 1 << 20
    return good(config)


def refused(_config: Config) -> NoisyResult:
    noise()
    raise InputError("data.items='x': not found; name a file")


def disk_full(_config: Config) -> NoisyResult:
    raise OSError(28, "No space left on device")


def broken(_config: Config) -> NoisyResult:
    noise()
    raise RuntimeError("a mistake of ours")


def interrupted(_config: Config) -> NoisyResult:
    raise KeyboardInterrupt

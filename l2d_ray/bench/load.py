"""Load on an endpoint, by Locust in a process of its own."""

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
    """What an endpoint did under a load."""

    rate: float | None
    """Requests a second that arrived; None: as fast as the clients got their answers."""
    per_second: float
    """Answers of status 200 a second, from the first request on."""
    p50_ms: float
    p95_ms: float
    p99_ms: float
    """Latency of these; Locust keeps two digits."""
    statuses: dict[str, int]
    """Answers by status; 0: none came."""


def load(
    url: str,
    path: str,
    bodies: Sequence[dict[str, Any]],
    seconds: int | None,
    rate: float | None = None,
    clients: int = 1,
) -> Load:
    """Post `bodies`, in turn, for so many seconds: at `rate`, or as fast as so many `clients` get their answers.

    `seconds=None` posts each once.

    Raises ModuleNotFoundError without Locust, and RuntimeError if no request succeeds.
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
        raise ModuleNotFoundError("locust is not installed: pip install locust")
    try:
        entries = {entry["name"]: entry for entry in json.loads(run.stdout)}
    except ValueError:
        raise RuntimeError(f"locust failed: {run.stderr[-1000:]}") from None
    if "200" not in entries:
        raise RuntimeError(f"{url}{path} answered no request: {list(entries)}")
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

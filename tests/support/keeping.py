"""Erasing from and compacting a small workspace without Ray, and the search for traces of a user in its files."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from l2d_ray.command_line import load_config
from l2d_ray.core.samples import sample_ids
from l2d_ray.data.dataset import Dataset
from l2d_ray.data.interactions import user_hashes
from l2d_ray.stages.compaction import CompactResult, compact
from l2d_ray.stages.erasure import EraseResult, erase
from l2d_ray.workspace import Workspace
from support.growing import fake_states

AT_ONCE = {"keep_snapshots": 1, "keep_days": 0, "grace_hours": 0}
"""Settings of jobs/compact.py that keep nothing but the newest."""


def run_here(label: str, step: Callable[..., Any], calls: list[tuple[Any, ...]]) -> list[Any]:
    """Run the calls of a step one after the other, as `distributed.tasks.run_tasks` does on Ray."""
    return [step(*call) for call in calls]


def erased(folder: Path, users: Sequence[str] = (), items: Sequence[str] = (), before: object = None) -> EraseResult:
    """Erase these from a workspace. The files with the ids are next to it."""
    settings = [f"workspace={folder}"]
    for name, ids in {"users": users, "items": items}.items():
        if ids:
            path = folder.with_name(f"{folder.name}-{name}.txt")
            path.write_text("".join(f"{one}\n" for one in ids))
            settings.append(f"erase.{name}={path}")
    return erase(load_config([*settings, *([f"erase.before={before}"] if before else [])]), run_here)


def compacted(folder: Path, **compact_settings: float) -> CompactResult:
    """Compact a workspace."""
    settings = [f"compact.{key}={value}" for key, value in compact_settings.items()]
    return compact(load_config([f"workspace={folder}", *settings]), run_here)


def opened(folder: Path) -> Dataset:
    """Return the newest version of the dataset."""
    return Dataset.open(Workspace.open(str(folder)))


def shape(folder: Path) -> Counter[str]:
    """Return the number of files by folder, without names that differ from run to run."""
    paths = (path.split("/") for path in Workspace.open(str(folder)).files(""))
    return Counter("/".join(path[:2]) for path in paths)


def ids_of(user: str, length: int) -> list[int]:
    """Return the ids of the samples of a user with this many interactions."""
    hashes = np.repeat(user_hashes(pa.array([user])), length - 1)
    return [int(one) for one in sample_ids(hashes, np.arange(1, length))]


def traces(folder: Path, user: str, ids: Sequence[int]) -> set[str]:
    """Return the files with the id of a user, its hash, or an id or a state of one of its samples, as text or bytes."""
    numbers = [int(user_hashes(pa.array([user]))[0]), *ids]
    needles = [user.encode(), *(str(number).encode() for number in numbers)]
    needles += [number.to_bytes(8, "little", signed=True) for number in numbers]
    needles += [state.tobytes() for state in fake_states(np.array(ids))]
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)) for path in paths if any(one in content(path) for one in needles)}


def content(path: Path) -> bytes:
    """Return the bytes of a file, and of the columns of Parquet as they are in memory."""
    found = [path.read_bytes()]
    if path.suffix == ".parquet":
        chunks = [chunk for column in pq.read_table(path).columns for chunk in column.chunks]
        found += [bytes(buffer) for chunk in chunks for buffer in chunk.buffers() if buffer]
    return b"\0".join(found)

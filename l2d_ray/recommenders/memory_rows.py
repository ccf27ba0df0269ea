"""The rows of the memory, for trainings that read them, and what decides the hidden state of a query.

Shapes: N rows, D dimension.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from l2d_ray.config import Config
from l2d_ray.encoding import identify_memory
from l2d_ray.errors import InputError, one_line
from l2d_ray.memory.store import MemoryStore
from l2d_ray.schema import hidden_states
from l2d_ray.workspace import Workspace

IRRELEVANT = {"format_version", "num_shards"}
"""Parts of a memory's identity that decide no state."""
ROWS = "memory.rows"
"""Name of the number of rows among the settings of a training."""


def identify_states(config: Config) -> dict[str, Any]:
    """Return what decides the state of a query, by dotted name; digests are cut to 12 characters.

    Raises InputError if the model or adapter is missing.
    """
    identity = identify_memory(config).model_dump(exclude=IRRELEVANT)
    return {f"memory.{name}": value[:12] if isinstance(value, str) else value for name, value in identity.items()}


def identify_rows(config: Config) -> dict[str, Any]:
    """Return what decides the rows of the snapshot `index.snapshot`, and their number, as `identify_states` does.

    The snapshot has its number and the digest of its record, which the manifest of an index has, too.
    """
    snapshot = MemoryStore(Workspace.open(config.workspace)).snapshot(config.index.snapshot)
    about = {"snapshot": snapshot.number, "snapshot_digest": snapshot.digest()[:12], "rows": snapshot.rows}
    return identify_states(config) | {f"memory.{name}": value for name, value in about.items()}


@dataclass(frozen=True)
class MemoryRows:
    """The rows of a snapshot in one array each."""

    states_ND: NDArray[np.float16]
    items_N: NDArray[np.int64]
    """The items that came next."""

    @classmethod
    def read(cls, config: Config) -> Self:
        """Read the rows of the snapshot `index.snapshot`, batch by batch. Raises InputError if a file is damaged."""
        workspace = Workspace.open(config.workspace)
        store = MemoryStore(workspace)
        snapshot = store.snapshot(config.index.snapshot)
        states_ND = np.empty((snapshot.rows, snapshot.identity.dimension), np.float16)
        items_N = np.empty(snapshot.rows, np.int64)
        start = 0
        try:
            for batch in store.read(snapshot, columns=["item_index", "hidden_state"]):
                stop = start + batch.num_rows
                states_ND[start:stop] = hidden_states(batch)
                items_N[start:stop] = batch.column("item_index").to_numpy()
                start = stop
        except (OSError, pa.ArrowException) as error:
            raise InputError(
                f"{workspace.path('memory')}: a file is missing or damaged ({one_line(error)}); run python -m"
                f" l2d_ray.memory verify {workspace.uri}, which names it"
            ) from None
        return cls(states_ND[:start], items_N[:start])

    def moments(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the mean and the standard deviation of each dimension."""
        mean_D = self.states_ND.mean(axis=0, dtype=np.float64)
        squares_D = np.zeros_like(mean_D)
        for start in range(0, len(self.states_ND), 4096):  # a part at a time, because float64 needs four times the room
            squares_D += np.square(self.states_ND[start : start + 4096] - mean_D).sum(axis=0)
        return mean_D, np.sqrt(squares_D / len(self.states_ND))

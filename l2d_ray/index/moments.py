"""Sums of one shard on disk, from which item means and the space of the index are computed."""

import io
from dataclasses import dataclass
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.arrays import Float64
from l2d_ray.core.moments import Moments
from l2d_ray.errors import InputError
from l2d_ray.index.files import write_arrays
from l2d_ray.workspace import Workspace


@dataclass(frozen=True)
class ShardMoments:
    """Item sums and second moments of a shard's rows."""

    items_I: NDArray[np.int32]
    """Items that have rows in the shard, ascending."""
    counts_I: NDArray[np.int64]
    sums_ID: Float64
    moments: Moments

    def write(self, workspace: Workspace, path: str) -> None:
        """Write the sums as one .npz."""
        item_arrays = {"items_I": self.items_I, "counts_I": self.counts_I, "sums_ID": self.sums_ID}
        write_arrays(workspace, path, item_arrays | vars(self.moments))

    @classmethod
    def read(cls, workspace: Workspace, path: str) -> "ShardMoments":
        """Read the sums that `write` wrote. Raises InputError if the file is damaged."""
        with workspace.filesystem.open_input_stream(workspace.path(path)) as stream:
            content = io.BytesIO(stream.read())
        try:
            arrays = dict(np.load(content))
            item_arrays = {name: arrays.pop(name) for name in ("items_I", "counts_I", "sums_ID")}
            rows, items = int(arrays.pop("rows")), int(arrays.pop("items"))
        except (ValueError, BadZipFile, EOFError, KeyError) as error:
            raise InputError(
                f"{workspace.path(path)}: damaged ({error}); delete it and run jobs/build_index.py again"
            ) from None
        return cls(**item_arrays, moments=Moments(rows=rows, items=items, **arrays))

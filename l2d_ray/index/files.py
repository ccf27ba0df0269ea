"""Files of an index: written with a checksum, and refused by name if they differ from their record."""

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from pyarrow import fs as pafs

from l2d_ray.core.arrays import Float64
from l2d_ray.core.space import ItemMeans, LinearMap
from l2d_ray.errors import InputError
from l2d_ray.index.manifest import IndexFile
from l2d_ray.workspace import DigestingSink, Workspace

REMEDY = "; delete the folders in index/ and run jobs/build_index.py again"


def write_bytes(workspace: Workspace, path: str, parts: Iterable[Any]) -> IndexFile:
    """Write the parts, one after the other, as one file, and return its record."""
    with workspace.create(path) as stream:
        sink = DigestingSink(stream)
        for part in parts:
            sink.write(part)
    return IndexFile(path=path, bytes=sink.count, sha256=sink.sha256)


def write_array(
    workspace: Workspace, path: str, shape: tuple[int, ...], dtype: DTypeLike, parts: Iterable[NDArray[Any]]
) -> IndexFile:
    """Write an array of this shape as NumPy's .npy, part by part, so that it need not fit into memory."""
    header = io.BytesIO()
    description = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(header, {"descr": description, "fortran_order": False, "shape": shape})
    content = (np.ascontiguousarray(part, dtype).data.cast("B") for part in parts if part.size)
    return write_bytes(workspace, path, (part for parts in ([header.getvalue()], content) for part in parts))


def read_array(workspace: Workspace, file: IndexFile, shape: tuple[int, ...], verify: bool = False) -> NDArray[Any]:
    """Return an array: mapped from a local disk, read from an object store.

    A mapped file is checked by its size and, with `verify`, by its checksum; a file that is read, by both. Raises
    InputError, naming the file, if it is missing, truncated, not an array or of another shape.
    """
    _check(workspace, file)
    path = workspace.path(file.path)
    try:
        if workspace.is_local:
            if verify:
                with Path(path).open("rb") as stream:
                    _check_digest(workspace, file, hashlib.file_digest(stream, "sha256"))
            array = np.load(path, mmap_mode="r") if 0 not in shape else np.load(path)
        else:
            array = np.load(io.BytesIO(read_bytes(workspace, file)))
    except ValueError as error:
        raise InputError(f"{path}: not a NumPy array ({error}){REMEDY}") from None
    if array.shape != shape:
        raise InputError(f"{path}: has shape {array.shape}, expected {shape}{REMEDY}")
    return array  # type: ignore[no-any-return]


def read_bytes(workspace: Workspace, file: IndexFile) -> bytes:
    """Return the content of a file. Raises InputError if it is missing or differs from its record."""
    _check(workspace, file)
    with workspace.filesystem.open_input_stream(workspace.path(file.path)) as stream:
        content = bytes(stream.read())
    _check_digest(workspace, file, hashlib.sha256(content))
    return content


def write_arrays(workspace: Workspace, path: str, arrays: dict[str, Any]) -> IndexFile:
    """Write small arrays as one .npz, without those that are None."""
    stream = io.BytesIO()
    np.savez(stream, **{name: array for name, array in arrays.items() if array is not None})
    return write_bytes(workspace, path, [stream.getbuffer()])


def read_arrays(workspace: Workspace, file: IndexFile) -> dict[str, NDArray[Any]]:
    """Return the arrays that `write_arrays` wrote. Raises InputError as `read_bytes` does."""
    return dict(np.load(io.BytesIO(read_bytes(workspace, file))))


def write_map(workspace: Workspace, path: str, space: LinearMap, offset_D: Float64) -> IndexFile:
    """Write the map of a space, and the offset that is subtracted from mapped vectors before float32."""
    return write_arrays(workspace, path, {"mean": space.mean_D, "matrix": space.matrix_DD, "offset": offset_D})


def read_map(workspace: Workspace, file: IndexFile) -> tuple[LinearMap, Float64]:
    """Return the map and the offset that `write_map` wrote."""
    parts = read_arrays(workspace, file)
    return LinearMap(parts.get("mean"), parts.get("matrix")), parts["offset"]


def write_means(workspace: Workspace, path: str, means: ItemMeans) -> IndexFile:
    """Write the estimate of items."""
    return write_arrays(workspace, path, {"axes": means.axes_DD, "signal": means.signal_D})


def read_means(workspace: Workspace, file: IndexFile) -> ItemMeans:
    """Return the estimate that `write_means` wrote."""
    parts = read_arrays(workspace, file)
    return ItemMeans(parts.get("axes"), parts.get("signal"))


def _check_digest(workspace: Workspace, file: IndexFile, digest: Any) -> None:
    if digest.hexdigest() != file.sha256:
        raise InputError(f"{workspace.path(file.path)}: its checksum is not the recorded one{REMEDY}")


def _check(workspace: Workspace, file: IndexFile) -> None:
    path = workspace.path(file.path)
    info = workspace.filesystem.get_file_info(path)
    if info.type != pafs.FileType.File:
        raise InputError(f"{path}: not found, but the index lists it{REMEDY}")
    if info.size != file.bytes:
        raise InputError(f"{path}: truncated or another file ({info.size} bytes, expected {file.bytes}){REMEDY}")

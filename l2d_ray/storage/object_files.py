"""Objects as files for pyarrow, which Parquet is read with and which Ray Train writes checkpoints with."""

from typing import Any

from obstore.fsspec import BufferedFile, FsspecStore


class ObjectFiles(FsspecStore):
    """obstore's filesystem, with files that take any buffer: obstore itself refuses those of signed bytes."""

    def _open(self, path: str, mode: str = "rb", *unused: Any, **options: Any) -> BufferedFile:
        file: BufferedFile = _File(self, path, mode, **options)  # type: ignore[call-overload]
        return file


class _File(BufferedFile):
    def write(self, data: Any) -> int:
        return super().write(memoryview(data).cast("B"))  # type: ignore[arg-type]

"""The place of a workspace: a folder on a disk, or a prefix in a bucket of S3 or Google Cloud Storage.

`local` and `object_store` implement the same contract. A file appears whole or not at all, and of several creators of
one file one wins.
"""

from pathlib import Path
from urllib.parse import urlsplit

from l2d_ray.storage.contract import Storage
from l2d_ray.storage.local import LocalStorage
from l2d_ray.storage.object_store import ObjectStorage

__all__ = ["LocalStorage", "ObjectStorage", "Storage", "open_storage"]


def open_storage(location: str) -> "LocalStorage | ObjectStorage":
    """Return the storage at a folder or URI, without a request. Raises InputError for a URI that cannot be used."""
    scheme, mark, _ = location.partition("://")
    if not mark:
        return LocalStorage(str(Path(location).expanduser().resolve()))
    if scheme == "file":
        return LocalStorage(urlsplit(location).path.rstrip("/") or "/")
    return ObjectStorage(location)

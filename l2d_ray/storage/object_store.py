"""A prefix in a bucket of S3 or Google Cloud Storage, or of a server that speaks like one of them.

obstore reads and writes. pyarrow's own clients would publish the beginning of an object whose writer raised, overwrite
an object that they were asked to create, and not repeat a short read that fails.

Credentials come from the standard chain of the provider: environment, profile, role of the machine or the pod. A URI
holds none, because logs and records show it.
"""

import io
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import GCSStore, S3Store
from pyarrow import fs as pafs

from l2d_ray.errors import InputError, one_line
from l2d_ray.storage.aws_credentials import AwsCredentials
from l2d_ray.storage.object_errors import as_os_error

if TYPE_CHECKING:
    from obstore.store import BackoffConfig

REQUEST_SECONDS, CONNECT_SECONDS, RETRIES = 30.0, 5.0, 15
"""Defaults of `request_timeout`, `connect_timeout` and `retries`. The retries span about half a minute, in which a
server restarts."""
BACKOFF: "BackoffConfig" = {"init_backoff": timedelta(seconds=0.3), "max_backoff": timedelta(seconds=10), "base": 3}
"""Before a retry a client waits for a random time: at least the first value, at most the last one `base` times."""
LONGEST_RETRY = timedelta(seconds=45)
"""No request is repeated later than this, so that a server that is down is reported within a minute."""
OWN_OPTIONS = {"request_timeout", "connect_timeout", "retries"}
S3_OPTIONS = {"region", "scheme", "endpoint_override", "anonymous"}
GS_OPTIONS = {"scheme", "endpoint_override", "anonymous"}
S3_ENDPOINTS = "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"
"""Environment variables of the AWS clients that name another server than Amazon's."""
PROBE = "conditional-put"
"""Name of an object that `ObjectStorage.check` creates in a workspace, once."""


@dataclass(frozen=True)
class ObjectStorage:
    """A prefix in a bucket, as a URI: `s3://bucket/prefix?region=…&connect_timeout=…`. Implements `Storage`.

    Options of every URI: `request_timeout` and `connect_timeout` in seconds, `retries` of a request, with exponential
    backoff and jitter. Of s3:// also `region`, `endpoint_override`, `scheme` and `anonymous`.
    """

    uri: str

    def __post_init__(self) -> None:
        """Raise InputError for a URI that cannot be used."""
        self.root, self._options, self._retries  # noqa: B018, the properties raise

    @cached_property
    def root(self) -> str:
        """Bucket and prefix."""
        parts = urlsplit(self.uri)
        if parts.scheme not in ("s3", "gs"):
            raise self._unusable(f"{parts.scheme}:// is not known; give a folder, s3://bucket/… or gs://bucket/…")
        if "@" in parts.netloc:
            raise self._unusable("a URI must not hold credentials; give them by the environment or a profile")
        if not parts.netloc:
            raise self._unusable("no bucket; give s3://bucket/folder or gs://bucket/folder")
        return f"{parts.netloc}{parts.path}".rstrip("/")

    @cached_property
    def filesystem(self) -> pafs.FileSystem:
        """The filesystem to read with, and for Ray Train to write checkpoints."""
        from l2d_ray.storage.object_files import ObjectFiles  # not above: fsspec takes a quarter of a second to import

        files = ObjectFiles(urlsplit(self.uri).scheme, **self._client)  # type: ignore[call-overload]
        return pafs.PyFileSystem(pafs.FSSpecHandler(files))

    @cached_property
    def bucket(self) -> Any:
        """The client of the whole bucket: an `obstore.store.ObjectStore`."""
        return (S3Store if self._is_s3 else GCSStore)(self._bucket_name, **self._client)

    @cached_property
    def _client(self) -> dict[str, Any]:
        """Arguments of obstore's clients."""
        options, endpoint = self._options, self.endpoint
        client: dict[str, Any] = {
            "client_options": {
                "timeout": timedelta(seconds=self._number("request_timeout", REQUEST_SECONDS)),
                "connect_timeout": timedelta(seconds=self._number("connect_timeout", CONNECT_SECONDS)),
                "allow_http": (endpoint or "").startswith("http://"),
            },
            "retry_config": {"max_retries": self._retries, "retry_timeout": LONGEST_RETRY, "backoff": BACKOFF},
            "skip_signature": options.get("anonymous") == "true",
        }
        if endpoint:
            client["endpoint" if self._is_s3 else "base_url"] = endpoint
        if self._is_s3:
            client["region"] = self._region()
            if not client["skip_signature"]:
                client["credential_provider"] = self._credentials()
        return client

    def _credentials(self) -> AwsCredentials:
        try:
            return AwsCredentials().found()
        except ValueError:
            raise self._unusable(
                "no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile, or give the machine"
                " a role"
            ) from None

    def _region(self) -> str:
        """Return the region of the URI, the environment or the profile, or ask Amazon for that of the bucket."""
        import boto3

        if region := self._options.get("region") or boto3.Session().region_name:
            return str(region)
        if self.endpoint:
            return "us-east-1"
        try:
            return str(pafs.resolve_s3_region(self._bucket_name))
        except OSError as error:
            raise self._unusable(f"{one_line(error)}; correct the bucket, or give ?region=") from None

    @contextmanager
    def create(self, path: str) -> Iterator["_Upload"]:
        """Open a stream, as `Storage.create` says."""
        with as_os_error(path):
            writer = obstore.open_writer(self.bucket, self._key(path))
        upload = _Upload(writer, path)
        try:
            yield upload
        except BaseException as error:
            writer.__exit__(type(error), error, error.__traceback__)  # nothing appears
            raise
        with as_os_error(path):
            try:
                writer.close()
            except BaseError:
                # The response to the last request was lost, and its repetition failed because the upload had ended.
                if self._size(path) != upload.size:
                    raise

    def write(self, path: str, content: bytes, new: bool = False) -> None:
        """Write a whole file in one request, as `Storage.write` says.

        A response may be lost, and the repeated request then finds the file of the first. So a file with the same
        content counts as written by this call.
        """
        with as_os_error(path):
            try:
                obstore.put(self.bucket, self._key(path), content, mode="create" if new else "overwrite")
            except AlreadyExistsError:
                if self.read(path) != content:
                    raise FileExistsError(f"{path}: exists") from None
            except BaseError:
                with suppress(OSError):
                    if self.read(path) == content:
                        return
                raise

    def read(self, path: str) -> bytes:
        """Return the content of a file in one request, as `Storage.read` says."""
        with as_os_error(path):
            return bytes(obstore.get(self.bucket, self._key(path)).bytes())

    def delete(self, path: str) -> None:
        """Remove a file or all files of a folder, as `Storage.delete` says."""
        self.remove([path, *self.files(path)])

    def files(self, folder: str) -> list[str]:
        """Return the paths of all files below a folder, as `Storage.files` says."""
        return list(self.times(folder))

    def times(self, folder: str) -> dict[str, float]:
        """Return when each file below a folder was written, as `Storage.times` says. A request lists 1,000."""
        name = self._bucket_name
        return {f"{name}/{entry['path']}": entry["last_modified"].timestamp() for entry in self._list(folder)}

    def remove(self, paths: Sequence[str]) -> None:
        """Remove files, as `Storage.remove` says. A request removes 1,000."""
        with as_os_error(self.root):
            obstore.delete(self.bucket, [self._key(path) for path in paths])

    def versions(self) -> dict[str, str]:
        """Return a digest or version of each object below the root by its key; it changes with the content."""
        return {entry["path"]: entry["e_tag"] or str(entry["last_modified"]) for entry in self._list(self.root)}

    def _list(self, folder: str) -> list[Any]:
        with as_os_error(folder):
            found = obstore.list(self.bucket, f"{self._key(folder)}/".removeprefix("/"))
            return [entry for batch in found for entry in batch]

    def check(self) -> None:
        """Create an object twice; the second attempt must fail. Later checks of the workspace take one request."""
        path = f"{self.root}/{PROBE}"
        with as_os_error(path):
            for _ in range(2):
                try:
                    obstore.put(self.bucket, self._key(path), b"", mode="create")
                except AlreadyExistsError:
                    return
        raise InputError(
            f"{self.uri!r}: this object store ignores If-None-Match, so two workers could overwrite each"
            " other's records; use S3, Google Cloud Storage or another store that honours it"
        )

    @property
    def _is_s3(self) -> bool:
        return self.uri.startswith("s3://")

    @cached_property
    def _options(self) -> dict[str, str]:
        options = dict(parse_qsl(urlsplit(self.uri).query))
        known = OWN_OPTIONS | (S3_OPTIONS if self._is_s3 else GS_OPTIONS)
        for name in options.keys() - known:
            raise self._unusable(f"{name}= is not known; use {', '.join(sorted(known))}")
        return options

    def _number(self, name: str, default: float) -> float:
        try:
            value = float(self._options.get(name, default))
        except ValueError:
            value = -1
        if not 0 <= value < math.inf:
            raise self._unusable(f"{name}={self._options[name]} is not a positive number")
        return value

    @property
    def _retries(self) -> int:
        return int(self._number("retries", RETRIES))

    @property
    def endpoint(self) -> str | None:
        """URL of the server, if it is not the provider's own."""
        given = self._options.get("endpoint_override")
        if given:
            return given if "://" in given else f"{self._options.get('scheme', 'https')}://{given}"
        return next(filter(None, map(os.environ.get, S3_ENDPOINTS)), None) if self._is_s3 else None

    @property
    def _bucket_name(self) -> str:
        return self.root.partition("/")[0]

    def _key(self, path: str) -> str:
        """Return the key in the bucket of a path of `filesystem`."""
        return path.partition("/")[2]

    def _size(self, path: str) -> int | None:
        try:
            return int(obstore.head(self.bucket, self._key(path))["size"])
        except FileNotFoundError:
            return None

    def _unusable(self, problem: str) -> InputError:
        return InputError(f"{self.uri!r}: {problem}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Send the URI alone to other processes: each makes its own clients."""
        return type(self), (self.uri,)


class _Upload(io.RawIOBase):
    """A binary file over obstore's writer, which counts what is written."""

    def __init__(self, writer: Any, path: str) -> None:
        self._writer, self._path, self.size = writer, path, 0

    def write(self, data: Any) -> int:
        """Write anything that has a buffer, and return its size in bytes."""
        view = memoryview(data).cast("B")
        with as_os_error(self._path):
            self._writer.write(view)
        self.size += view.nbytes
        return view.nbytes

    def writable(self) -> bool:
        """Return True."""
        return True

"""Where the images of jobs are: a folder, or a bucket of S3 or of what speaks its protocol.

Knows names and bytes; not jobs. The package for S3 is imported when a bucket is opened.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from sdrt.atomic_files import write_atomic
from sdrt.errors import StorageError, UsageError

if TYPE_CHECKING:
    from obstore.store import S3Store

log = logging.getLogger("sdrt.serve")

T = TypeVar("T")
S3_SCHEME = "s3://"
ENDPOINT_VARIABLE = "AWS_ENDPOINT_URL"
MAX_PRESIGNED_SECONDS = 604_800.0  # of Signature Version 4
TIMEOUT = timedelta(seconds=30)
MAX_RETRIES = 3


class ResultStore(Protocol):
    """What a store of images does. Every method may be called in any thread, and raises
    StorageError for a store that fails; `read` FileNotFoundError for an image that is not there.
    """

    def write(self, job_id: str, name: str, content: bytes, media_type: str) -> None: ...
    def read(self, job_id: str, name: str) -> bytes: ...
    def remove(self, job_id: str, names: Sequence[str]) -> None: ...
    def presign(self, job_id: str, name: str, seconds: float) -> str | None:
        """A URL that anyone may read for so long; None where there are none."""


@dataclass(frozen=True, slots=True)
class FolderResults:
    """Images in the folders of their jobs, which the job store removes."""

    folder: Path

    def write(self, job_id: str, name: str, content: bytes, media_type: str) -> None:
        try:
            write_atomic(self.folder / job_id / name, content)
        except OSError as error:
            raise StorageError(f"cannot write an image: {error.strerror}") from error

    def read(self, job_id: str, name: str) -> bytes:
        return (self.folder / job_id / name).read_bytes()

    def remove(self, job_id: str, names: Sequence[str]) -> None:
        for name in names:
            (self.folder / job_id / name).unlink(missing_ok=True)

    def presign(self, job_id: str, name: str, seconds: float) -> str | None:
        return None


@dataclass(frozen=True, slots=True)
class S3Results:
    """Images as objects `prefix/job_…/0.png` of a bucket."""

    bucket: "S3Store"

    def write(self, job_id: str, name: str, content: bytes, media_type: str) -> None:
        import obstore

        attributes: Any = {"Content-Type": media_type}
        path = f"{job_id}/{name}"
        _call(lambda: obstore.put(self.bucket, path, content, attributes=attributes))

    def read(self, job_id: str, name: str) -> bytes:
        import obstore
        from obstore.exceptions import NotFoundError

        path = f"{job_id}/{name}"
        try:
            return _call(lambda: bytes(obstore.get(self.bucket, path).bytes()))
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError | NotFoundError):
                raise FileNotFoundError("no such object") from error
            raise

    def remove(self, job_id: str, names: Sequence[str]) -> None:
        import obstore

        if names:
            _call(lambda: obstore.delete(self.bucket, [f"{job_id}/{name}" for name in names]))

    def presign(self, job_id: str, name: str, seconds: float) -> str | None:
        import obstore

        duration = timedelta(seconds=max(1.0, min(seconds, MAX_PRESIGNED_SECONDS)))
        return _call(lambda: obstore.sign(self.bucket, "GET", f"{job_id}/{name}", duration))


def open_s3_results(url: str) -> S3Results:
    """The store of `s3://bucket/prefix`. Credentials, region and endpoint are those of the
    environment (`AWS_ACCESS_KEY_ID`, `AWS_REGION`, `AWS_ENDPOINT_URL`) or of the machine's role.
    An object is written and deleted, so that a server that cannot store starts no job.

    Raises:
        UsageError: It is no such URL, the package is missing, or the bucket cannot be written.
    """
    bucket = url.removeprefix(S3_SCHEME).partition("/")[0]
    if not url.startswith(S3_SCHEME) or not bucket or "?" in url or "#" in url:
        raise UsageError(f"--results {url!r}; expected s3://BUCKET or s3://BUCKET/PREFIX")
    try:
        from obstore.exceptions import BaseError
        from obstore.store import S3Store
    except ImportError as error:
        raise UsageError(
            f"--results {S3_SCHEME} requires obstore", hint="run `pip install 'sdrt[s3]'`"
        ) from error
    try:
        store = S3Store.from_url(
            url,
            client_options={
                "timeout": TIMEOUT,
                "connect_timeout": timedelta(seconds=5),
                "allow_http": os.environ.get(ENDPOINT_VARIABLE, "").startswith("http://"),
            },
            retry_config={"max_retries": MAX_RETRIES, "retry_timeout": TIMEOUT},
        )
        results = S3Results(store)
        results.write("check", "empty", b"", "application/octet-stream")
        results.remove("check", ["empty"])
    except (BaseError, StorageError, ValueError) as error:
        reason = _first_line(error.__cause__ or error)
        raise UsageError(
            f"cannot write to {url}: {reason}",
            hint="set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION, and "
            f"{ENDPOINT_VARIABLE} for a server that is not AWS's",
        ) from error
    return results


def _call(function: Callable[[], T]) -> T:
    """What a function of obstore returns; raises StorageError."""
    from obstore.exceptions import BaseError

    try:
        return function()
    except (BaseError, OSError) as error:
        log.warning("The result store failed: %s", _first_line(error))
        raise StorageError("the result store failed; see the server's log") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]

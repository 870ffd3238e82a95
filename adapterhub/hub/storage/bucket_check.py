"""Whether the blobs in a bucket have the digests of their names; `maintenance.fsck` looks at logs, index and copies only."""

from __future__ import annotations

from collections.abc import Iterator

from adapterhub.digest import is_hex
from adapterhub.maintenance.findings import REPAIR, Finding
from adapterhub.remotes.objects.bucket import Bucket
from adapterhub.store.store import Progress, counter
from adapterhub_converters.errors import AdapterhubError

from .bucket_blobs import hash_blob


def check(bucket: Bucket, progress: Progress | None = None) -> Iterator[Finding]:
    """Read every blob in a bucket, and yield a finding for each that is damaged or cannot be read."""
    blobs = [(key, size) for key, size, _ in bucket.objects("blobs/sha256")]
    count_bytes = counter(progress, sum(size for _, size in blobs))
    for key, size in blobs:
        location, name = f"{bucket.location}/{key}", key.rpartition("/")[2]
        if not is_hex(name):
            yield Finding("foreign", "note", location, "not a blob")
            continue
        try:
            is_right = hash_blob(bucket, f"sha256:{name}", size, count_bytes) == f"sha256:{name}"
        except AdapterhubError as error:
            yield Finding("unreadable", "error", location, error.what, *REPAIR)
            continue
        if not is_right:
            yield Finding("flipped", "error", location, "its bytes do not have the digest of its name", *REPAIR)

"""Whether the blobs in a bucket have the digests of their names; `maintenance.fsck` looks at logs, index and copies only."""

from __future__ import annotations

from collections.abc import Iterator

from adapterhub.digest import is_hex
from adapterhub.maintenance.findings import REPAIR, Finding
from adapterhub.maintenance.fsck import EVERYTHING, Scope
from adapterhub.remotes.objects.bucket import Bucket
from adapterhub.store.store import Progress, counter
from adapterhub_converters.errors import AdapterhubError

from .bucket_blobs import hash_blob


def check(bucket: Bucket, scope: Scope = EVERYTHING, progress: Progress | None = None) -> Iterator[Finding]:
    """Read the blobs in a bucket that are in scope, and yield a finding for each that is damaged or cannot be read."""
    blobs = []
    for key, size, stored in bucket.objects("blobs/sha256"):
        name = key.rpartition("/")[2]
        if not is_hex(name):
            yield Finding("foreign", "note", f"{bucket.location}/{key}", "not a blob")
        elif scope.includes(f"sha256:{name}", stored):
            blobs.append((key, size))
    count_bytes = counter(progress, sum(size for _, size in blobs))
    for key, size in blobs:
        location, name = f"{bucket.location}/{key}", key.rpartition("/")[2]
        try:
            is_right = hash_blob(bucket, f"sha256:{name}", size, count_bytes) == f"sha256:{name}"
        except AdapterhubError as error:
            yield Finding("unreadable", "error", location, error.what, *REPAIR)
            continue
        if not is_right:
            yield Finding("flipped", "error", location, "its bytes do not have the digest of its name", *REPAIR)

"""The digest cache, which keeps unchanged files from being hashed again.

As in git's index (`Documentation/technical/racy-git`), an entry has a file's size, times of modification and change in
nanoseconds as far as the file system has them, inode and device. If any of them differs, the file is hashed again. A file that
changed a moment ago is not entered, because another change within the same clock tick would not show.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapterhub.digest import Digest, is_hex, sha256_file
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import AdapterhubError

_CLOCK_TICK = 2_000_000_000  # nanoseconds; FAT has the coarsest clock of all file systems


def digest(path: Path, cache: Path | None, compute: Callable[[], Digest] | None = None) -> Digest:
    """Return the digest of a file from the folder `cache`, or else from `compute`, which reads the file unless given."""
    compute = compute or (lambda: sha256_file(path))
    if cache is None:
        return compute()
    entry = cache / "digests" / (hashlib.sha256(os.fsencode(path.resolve())).hexdigest() + ".json")
    state = _file_state(path)
    cached = _read(entry)
    if cached.get("state") == state and is_hex(str(cached.get("digest")).removeprefix("sha256:")):
        return str(cached["digest"])
    computed = compute()
    # The state is compared again, because the file may have changed while it was hashed.
    if _file_state(path) == state and time.time_ns() - max(state["changed"], state["modified"]) > _CLOCK_TICK:
        _write(entry, {"path": str(path.resolve()), "state": state, "digest": computed})
    return computed


def _file_state(path: Path) -> dict[str, int]:
    try:
        status = path.stat()
    except OSError:
        return {"changed": 0, "modified": 0}  # hashing the file will report the error
    return {
        "size": status.st_size, "modified": status.st_mtime_ns, "changed": status.st_ctime_ns, "inode": status.st_ino,
        "device": status.st_dev,
    }  # fmt: skip


def _read(entry: Path) -> dict[str, Any]:
    with contextlib.suppress(AdapterhubError):
        return json_file.read_object(entry)
    return {}


def _write(entry: Path, document: dict[str, Any]) -> None:
    # A digest that cannot be cached is computed again next time.
    temporary = entry.with_name(f".{entry.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps(document))
            os.replace(temporary, entry)
        finally:
            temporary.unlink(missing_ok=True)

"""The digest cache: a file that has not changed since it was hashed is not hashed again.

As in git's index (`Documentation/technical/racy-git`), an entry has a file's size, its times of change, its inode and device,
in nanoseconds as the file system has them. If any of them differs, the file is hashed again. A file that changed a moment ago
is not entered, because a change within the same tick of the clock would not show.
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

_SETTLED = 2_000_000_000  # nanoseconds: the coarsest clock of a file system (FAT)


def digest(path: Path, cache: Path | None, compute: Callable[[], Digest] | None = None) -> Digest:
    """Return the digest of a file: from the folder `cache`, else from `compute`, which reads the file unless given."""
    compute = compute or (lambda: sha256_file(path))
    if cache is None:
        return compute()
    entry = cache / "digests" / (hashlib.sha256(os.fsencode(path.resolve())).hexdigest() + ".json")
    state = _state(path)
    cached = _read(entry)
    if cached.get("state") == state and is_hex(str(cached.get("digest")).removeprefix("sha256:")):
        return str(cached["digest"])
    computed = compute()
    if _state(path) == state and time.time_ns() - max(state["changed"], state["modified"]) > _SETTLED:
        _write(entry, {"path": str(path.resolve()), "state": state, "digest": computed})
    return computed


def _state(path: Path) -> dict[str, int]:
    try:
        stat = path.stat()
    except OSError:
        return {"changed": 0, "modified": 0}  # hashing it reports the error
    return {
        "size": stat.st_size, "modified": stat.st_mtime_ns, "changed": stat.st_ctime_ns, "inode": stat.st_ino,
        "device": stat.st_dev,
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

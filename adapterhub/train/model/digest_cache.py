"""Digests of files that were read before: a file that hasn't changed isn't read again.

As git's index does (`Documentation/technical/racy-git`): remembered is a file's size, its times of change, its inode and
device, in nanoseconds as the file system has them. One of them other than remembered, and the file is hashed anew. A file
that changed a moment ago is not remembered, because a change within the same tick of the clock would not show.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from adapterhub.digest import Digest, is_hex, sha256_file
from adapterhub_converters.bases import gguf, weight_files
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import AdapterhubError

from .weights import is_gguf

_SETTLED = 2_000_000_000  # nanoseconds: the coarsest clock of a file system (FAT)


def weights(base: Path, cache: Path | None) -> list[dict[str, Any]]:
    """Name, digest and size of the files of a base's weights; `cache` is the folder that remembers them, if one does.

    A fingerprint says a base's shapes alone, which a fine-tune of it shares.
    """
    files = gguf.part_paths(base) if is_gguf(base) else weight_files(base)
    return [{"path": path.name, "digest": digest(path, cache), "size": path.stat().st_size} for path in files]


def digest(path: Path, cache: Path | None) -> Digest:
    """The digest of a file's bytes."""
    if cache is None:
        return sha256_file(path)
    place = cache / "digests" / (hashlib.sha256(os.fsencode(path.resolve())).hexdigest() + ".json")
    now = _state(path)
    known = _read(place)
    if known.get("state") == now and is_hex(str(known.get("digest")).removeprefix("sha256:")):
        return str(known["digest"])
    found = sha256_file(path)
    if _state(path) == now and time.time_ns() - max(now["changed"], now["modified"]) > _SETTLED:
        _write(place, {"path": str(path.resolve()), "state": now, "digest": found})
    return found


def _state(path: Path) -> dict[str, int]:
    try:
        seen = path.stat()
    except OSError:
        return {"changed": 0, "modified": 0}  # hashing it says what is wrong
    return {
        "size": seen.st_size, "modified": seen.st_mtime_ns, "changed": seen.st_ctime_ns, "inode": seen.st_ino,
        "device": seen.st_dev,
    }  # fmt: skip


def _read(place: Path) -> dict[str, Any]:
    with contextlib.suppress(AdapterhubError):
        return json_file.read_object(place)
    return {}


def _write(place: Path, document: dict[str, Any]) -> None:
    # What cannot be remembered is hashed again.
    temporary = place.with_name(f".{place.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps(document))
            os.replace(temporary, place)
        finally:
            temporary.unlink(missing_ok=True)

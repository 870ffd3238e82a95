"""Digests: `sha256:<64 hex>` of bytes, checked before one ever becomes a path.

sha256 because OCI, Hugging Face's LFS and sigstore all name bytes by it. Ollama took a digest from a manifest as
a path unchecked (CVE-2024-37032); here nothing but `parse_digest` makes a digest from text.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from adapterhub_converters.errors import FormatError, LocalIOError, NotFoundError

Digest = str

CHUNK = 1 << 20  # bytes; larger gains nothing, and two of these are all that a copy holds
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def parse_digest(text: object, where: str = "") -> Digest:
    """`text` itself if it is a whole, lower-case sha256 digest, else FormatError."""
    if not isinstance(text, str) or not _DIGEST.fullmatch(text):
        raise FormatError(where, f"{str(text)[:80]!r} is not a digest of the form sha256:<64 hex>")
    return text


def is_hex(text: str) -> bool:
    """Whether `text` is the 64 digits of a digest, as a blob's file is named."""
    return _DIGEST.fullmatch(f"sha256:{text}") is not None


def sha256_bytes(data: bytes) -> Digest:
    """The digest of bytes in memory."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> Digest:
    """The digest of a file's bytes, read in chunks."""
    try:
        with open(path, "rb", buffering=0) as file:
            return copy_hashing(file, None)[0]
    except FileNotFoundError as error:
        raise NotFoundError(str(path), "no such file") from error
    except OSError as error:
        raise LocalIOError(str(path), error.strerror or str(error)) from error


def copy_hashing(source: Any, target: Any | None, *, limit: int = 2**63) -> tuple[Digest, int]:
    """Copy an unbuffered file to another (None: nowhere), each byte hashed as it passes; its digest and size in bytes.

    Stops soon after `limit` bytes, with a size beyond it: a source that never ends must not fill the disk.
    """
    state, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(CHUNK))
    while size <= limit and (n := source.readinto(buffer)):
        chunk = buffer[:n]
        state.update(chunk)
        size += n
        while target is not None and len(chunk):
            chunk = chunk[target.write(chunk) :]
    return "sha256:" + state.hexdigest(), size

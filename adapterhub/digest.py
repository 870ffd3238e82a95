"""Digests: `sha256:<64 hex>` of bytes, checked before one is used as a path.

sha256 because OCI, Hugging Face's LFS and sigstore all name bytes by it. Ollama used a digest from a manifest as a path
unchecked (CVE-2024-37032); here only `parse_digest` turns text into a digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from adapterhub_converters.containers.open_file import BytesConsumer, open_regular
from adapterhub_converters.errors import FormatError, LocalIOError, NotFoundError

Digest = str

CHUNK = 1 << 20  # bytes; larger is not faster, and a copy holds at most two of these
_FIRST_CHUNK = 1 << 16  # bytes; most files are smaller, and to clear a whole chunk costs more than to copy them
_PREFIX, _HEX = "sha256:", frozenset("0123456789abcdef")


def parse_digest(text: object, location: str = "") -> Digest:
    """Return `text` if it is a whole, lower-case sha256 digest, else raise FormatError."""
    if not isinstance(text, str) or not (text.startswith(_PREFIX) and is_hex(text[len(_PREFIX) :])):
        raise FormatError(location, f"{str(text)[:80]!r} is not a digest of the form sha256:<64 hex>")
    return text


def is_hex(text: str, digits: int = 64) -> bool:
    """Return whether `text` is that many lower-case hexadecimal digits; by default, as many as a digest has."""
    return len(text) == digits and _HEX.issuperset(text)


def sha256_bytes(data: bytes) -> Digest:
    """Return the digest of bytes in memory."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def sha256_file(path: Path, on_bytes: Callable[[int], object] | None = None) -> Digest:
    """Return the digest of a file's bytes, read in chunks."""
    return sha256_and_head(path, 0, on_bytes)[0]


def sha256_and_head(
    path: Path,
    head: int,
    on_bytes: Callable[[int], object] | None = None,
    consumer_of: Callable[[BinaryIO], BytesConsumer] | None = None,
) -> tuple[Digest, bytes]:
    """Return the digest of a file's bytes and the first `head` of them, opening the file once.

    `consumer_of` may read in the open file, and returns what is called with its bytes, in order.
    """
    try:
        with open_regular(path) as file:
            first = file.read(head)
            # The head is read and hashed from one handle, so that both are of the same file even if it is replaced meanwhile.
            consumer = consumer_of(file) if consumer_of else None
            file.seek(0)
            return copy_hashing(file, None, consumer=consumer, on_bytes=on_bytes)[0], first
    except FileNotFoundError as error:
        raise NotFoundError(str(path), "no such file", code="no-such-file") from error
    except OSError as error:
        raise LocalIOError(str(path), error.strerror or str(error)) from error


def copy_hashing(
    source: Any,
    target: Any | None,
    *,
    limit: int = 2**63,
    consumer: Callable[[memoryview], object] | None = None,
    on_bytes: Callable[[int], object] | None = None,
) -> tuple[Digest, int]:
    """Copy an unbuffered file to another (None: only hash it) and return the digest and the size in bytes.

    Stops soon after `limit` bytes, with a size beyond it: a source that never ends must not fill the disk.

    Args:
        source: A file with `readinto`.
        target: A file with `write`.
        limit: The limit in bytes.
        consumer: Called with every chunk in order, on a second thread, because hashing releases the interpreter's lock.
        on_bytes: Called with the number of bytes since its last call.
    """
    state, size = hashlib.sha256(), 0
    with _SecondThread(consumer) as second:
        while size <= limit and (n := source.readinto(second.buffer)):
            chunk = second.start(n)
            state.update(chunk)
            size += n
            # An unbuffered file may take fewer bytes than it was given.
            while target is not None and len(chunk):
                chunk = chunk[target.write(chunk) :]
            if on_bytes:
                on_bytes(n)
            if n == _FIRST_CHUNK == len(second.buffer):
                second.grow()
    return "sha256:" + state.hexdigest(), size


class _SecondThread:
    """Calls `work` with chunks, large ones on a thread of its own; `buffer` is free to be filled meanwhile."""

    def __init__(self, work: Callable[[memoryview], object] | None) -> None:
        self._work = work
        self._buffers = [memoryview(bytearray(_FIRST_CHUNK))]
        self._pool: Any = None
        self._pending: Any = None

    @property
    def buffer(self) -> memoryview:
        return self._buffers[0]

    def grow(self) -> None:
        """Take whole chunks from here on, once the pending work is done with the first."""
        self._settle()
        self._buffers = [memoryview(bytearray(CHUNK)) for _ in range(2 if self._work else 1)]

    def start(self, size: int) -> memoryview:
        """Start work on the first `size` bytes of the buffer, after the previous chunk is done, and return them."""
        chunk = self._buffers[0][:size]
        if self._work:
            self._settle()
            # A thread pays off only for files larger than one chunk; most files of a repository are smaller.
            if self._pool is None and size == CHUNK:
                from concurrent.futures import ThreadPoolExecutor

                self._pool = ThreadPoolExecutor(1)
            if self._pool:
                # At most one chunk is pending, so that two buffers suffice.
                self._pending = self._pool.submit(self._work, chunk)
                self._buffers.reverse()
            else:
                self._work(chunk)
        return chunk

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def __enter__(self) -> _SecondThread:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._settle()
        finally:
            if self._pool:
                self._pool.shutdown()

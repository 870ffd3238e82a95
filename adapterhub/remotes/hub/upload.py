"""A large file to a hub: git-lfs's basic transfer, or the parts of Hugging Face's multipart (huggingface_hub, `lfs.py`).

The file streams from its source and is hashed on the way. Its last byte is sent only when all of it was right, so that what
the hub gets of another file is never a whole one.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

from adapterhub.digest import CHUNK
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.remotes.download import Steady
from adapterhub.remotes.protocol import Reader, Source
from adapterhub.remotes.wire import Answer
from adapterhub_converters.errors import IntegrityError, NotFoundError, RemoteError

from .api import Api

_LFS = {"Content-Type": "application/vnd.git-lfs+json", "Accept": "application/vnd.git-lfs+json"}
_ENDS = (200, 201, 204)


def upload(api: Api, blob: Descriptor, source: Source, pauses: Sequence[float]) -> int:
    """Have the hub store a blob; how many bytes were sent for that.

    Raises:
        IntegrityError: Its bytes are not those of its digest; the hub has no such file.
    """
    where = f"{api.where}: {blob.path or blob.digest}"
    actions = api.batch(blob.digest, blob.size)
    if actions is None:
        return 0
    url, header = _action(actions["upload"], where)
    if "chunk_size" in header:
        _parts(api, url, header, _Piece(blob, source, pauses), where)
    else:
        _put(api, url, header, _Piece(blob, source, pauses), where)
    if isinstance(actions.get("verify"), dict):
        url, header = _action(actions["verify"], where)
        body = json.dumps({"oid": blob.digest[7:], "size": blob.size}).encode()
        api.wire.ask("POST", url, where, good=_ENDS, headers={**header, **_LFS}, body=body)
    return blob.size


class Memory:
    """Bytes at hand, as a source."""

    def __init__(self, data: bytes, where: str) -> None:
        self._data, self.where = data, where

    def manifest(self, reference: str) -> Manifest:
        """None."""
        raise NotFoundError(self.where, f"no version {reference}")

    @contextmanager
    def open_blob(self, _blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        """The bytes."""
        yield io.BytesIO(self._data[start:])

    def tags(self) -> list[str]:
        """None."""
        return []


class _Piece:
    """Some bytes of a blob as the body of a request, read anew each time it is sent; whole ends are checked first."""

    def __init__(self, blob: Descriptor, source: Source, pauses: Sequence[float]) -> None:
        self.blob, self._source, self._pauses = blob, source, pauses
        self._start, self._size, self._before, self.after = 0, blob.size, hashlib.sha256(), hashlib.sha256()

    def then(self, start: int, size: int) -> _Piece:
        """The piece after this one, which has been sent."""
        piece = _Piece(self.blob, self._source, self._pauses)
        piece._start, piece._size, piece._before = start, size, self.after
        return piece

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[bytes]:
        state, left = self._before.copy(), self._size
        with Steady(self._source, self.blob, self._start, pauses=self._pauses) as reader:
            buffer = memoryview(bytearray(min(CHUNK, max(self._size, 1))))
            held = b""
            while left and (n := reader.readinto(buffer[: min(len(buffer), left)])):
                if held:
                    yield held
                held = bytes(buffer[:n])
                state.update(held)
                left -= n
        whole = self._start + self._size == self.blob.size
        if left or (whole and f"sha256:{state.hexdigest()}" != self.blob.digest):
            what = f"other bytes were read than the {self.blob.size} of {self.blob.digest}"
            where = f"{self._source.where}: {self.blob.path or self.blob.digest}"
            raise IntegrityError(where, what, "Nothing was stored; if it comes of the registry here, run `adapterhub fsck`")
        self.after = state
        yield held


def _parts(api: Api, url: str, header: Mapping[str, str], whole: _Piece, where: str) -> None:
    """Send what `whole` is of in the parts that a header names, and have them put together at `url`."""
    blob = whole.blob
    size = int(header["chunk_size"]) if re.fullmatch(r"[1-9][0-9]{0,11}", header["chunk_size"]) else 0
    numbers = sorted(int(key) for key in header if re.fullmatch(r"[1-9][0-9]{0,4}", key))
    if not size or numbers != list(range(1, -(-blob.size // size) + 1)):
        raise RemoteError(where, "the hub asks for parts that do not make the file")
    piece, done = whole, []
    for number in numbers:
        start = (number - 1) * size
        piece = piece.then(start, min(size, blob.size - start))
        etag = _put(api, header[str(number)], {}, piece, where).headers.get("etag")
        if not etag:
            raise RemoteError(where, f"the hub's storage does not say that it has part {number}", "Try again")
        done.append({"partNumber": number, "etag": etag})
    body = json.dumps({"oid": blob.digest[7:], "parts": done}).encode()
    api.wire.ask("POST", url, where, good=_ENDS, headers=_LFS, body=body)


def _put(api: Api, url: str, headers: Mapping[str, str], piece: _Piece, where: str) -> Answer:
    body = cast(bytes, piece)  # http.client sends what can be iterated; the length is said beforehand
    return api.wire.ask("PUT", url, where, good=_ENDS, headers=headers, body=body)


def _action(action: object, where: str) -> tuple[str, dict[str, str]]:
    """Where an action is to be done, and the headers that it takes."""
    found = action if isinstance(action, dict) else {}
    href, header = found.get("href"), found.get("header") or {}
    if not isinstance(href, str) or not isinstance(header, dict):
        raise RemoteError(where, "the hub does not say how a large file is sent")
    clean = {str(key): str(value) for key, value in header.items() if str(key).lower() not in ("content-length", "host")}
    if not all(text.isascii() and text.isprintable() for pair in clean.items() for text in pair):
        raise RemoteError(where, "the hub wants headers that there cannot be")
    return href, clean

"""Writing to a hub through huggingface_hub: repositories, branches, commits, large files; and access rights.

The library builds the requests and reads the answers (`HfApi`, `lfs.py`); its requests are sent over our own connection
(`_answered`). So writing has the rules of reading: the token goes to the hub's origin only, answers have a limit and a timeout,
no redirect is followed, and proxies, retries and one-line errors are the same. The library's HTTP session is left alone
outside the calls made here, for others in this process who use it. Its user agent, its request for a list of agent harnesses
and its own search for a token are off.

Large files are sent with git-lfs, not with Xet. On loopback, 256 MiB took 1.15 s and 211 MiB of memory with Xet, 0.7 s and
28 MiB with git-lfs (huggingface_hub 2.4.0, hf-xet 1.8.0), and LoRA versions share no chunks that Xet could skip. hf-xet reads
only paths, where an adapter may come from a pack or from another registry; has an HTTP client of its own, without our limits
and timeouts; sends telemetry; keeps logs and a cache in HF_HOME; and fails on a hub without Xet. `CommitOperationAdd` alone
would read a file once more to hash it before it is sent: 1.2 to 1.8 s instead of 0.8. Here the digest is known, and is checked
while sending: the last byte of a file is sent only when all bytes were right, so a hub never gets a whole file of wrong bytes.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from contextvars import ContextVar
from typing import Any
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.lfs import UploadInfo, lfs_upload, post_lfs_batch_info
from huggingface_hub.utils import get_session

from adapterhub.digest import CHUNK, is_hex, sha256_bytes
from adapterhub.http.client import PAUSES
from adapterhub.http.errors import DeniedError
from adapterhub.http.urls import ProxyOf, no_proxy
from adapterhub.manifest.oci_manifest import Descriptor, parse_json
from adapterhub.remotes.download import Steady
from adapterhub.remotes.location import Access
from adapterhub.remotes.protocol import Reader, Source
from adapterhub_converters.errors import ConflictError, FormatError, IntegrityError, RefusedError, RemoteError

from .client import COMMIT, MAX_ANSWER, HubClient, HubWire

_HTTPX: Any = importlib.import_module(HfHubHTTPError.__mro__[1].__module__)  # httpx; httpx2 since huggingface_hub 2.0
_NONSENSE = (
    ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError, _HTTPX.InvalidURL, _HTTPX.HTTPError
)  # fmt: skip
"""What the library raises for an answer that it cannot read."""
Changes = Mapping[str, bytes | Descriptor | None]
"""Path to the new bytes of a file, to a large file that was uploaded, or to None for a file to remove."""
_SAMPLE = 512  # bytes of a file from which the hub decides how to store it
_MOST = 256  # files in one request about that


class HubWriter:
    """One repository of a hub, for writing.

    Attributes:
        warnings: What the hub remarked about the model card.
    """

    def __init__(self, client: HubClient) -> None:
        self._client, self._wire, self._where, self._repo = client, client.wire, client.where, client.repo
        self._api = HfApi(endpoint=client.endpoint, token=False)  # the wire has the token
        self.warnings: list[str] = []

    def create(self, *, private: bool = False) -> bool:
        """Create the repository, private or with the hub's default visibility; return whether it is new."""
        try:
            with _calling(self._wire, self._where):
                self._api.create_repo(self._repo, private=True if private else None)
        except ConflictError:
            return False
        return True

    def branch(self, name: str, start: str) -> None:
        """Create a branch at a commit.

        Raises:
            ConflictError: It exists.
        """
        with _calling(self._wire, f"{self._where}@{name}"):
            self._api.create_branch(self._repo, branch=name, revision=start)

    def drop_branch(self, name: str) -> None:
        """Remove a branch."""
        with _calling(self._wire, f"{self._where}@{name}"):
            self._api.delete_branch(self._repo, branch=name)

    def modes(self, revision: str, files: Mapping[str, bytes]) -> set[str]:
        """The paths of those files that the hub wants as large files.

        `HfApi.preupload_lfs_files` would ask the same, and send them by Xet at once.
        """
        samples = [
            {"path": path, "size": len(data), "sample": base64.b64encode(data[:_SAMPLE]).decode()}
            for path, data in files.items()
        ]
        large: set[str] = set()
        url, headers = f"{self._client.url}/preupload/{quote(revision, safe='')}", {"Content-Type": "application/json"}
        for n in range(0, len(samples), _MOST):
            body = json.dumps({"files": samples[n : n + _MOST]}).encode()
            answer = self._wire.ask("POST", url, self._where, good=(200,), headers=headers, body=body, limit=MAX_ANSWER)
            found = parse_json(answer.body, self._where).get("files")
            for entry in found if isinstance(found, list) else []:
                if isinstance(entry, dict) and entry.get("uploadMode") == "lfs":
                    large.add(str(entry.get("path")))
        return {path for path in large if files.get(path)}  # an empty file is never a large one

    def upload(self, blob: Descriptor, source: Source) -> int:
        """Store a blob of `source` as a large file; return how many bytes were sent, 0 if the hub has it.

        Raises:
            IntegrityError: Its bytes do not have its digest; the hub has no such file.
        """
        return self._send(blob, source.where, lambda start: Steady(source, blob, start, pauses=self._client.pauses))

    def _send(self, blob: Descriptor, origin: str, opened: Callable[[int], AbstractContextManager[Reader]]) -> int:
        path = blob.path or blob.digest
        file = _Outgoing(blob, f"{origin}: {path}", opened)
        operation = _addition(path, blob)
        operation.path_or_fileobj = file
        repository = {"repo_type": "model", "repo_id": self._repo, "endpoint": self._client.endpoint}
        with _calling(self._wire, f"{self._where}: {path}", file):
            found, errors, *_ = post_lfs_batch_info([operation.upload_info], token=False, **repository)
            if errors:
                what = self._wire.clean(errors[0]["error"]["message"])
                raise RemoteError(self._where, f"the hub refuses a file of {blob.size} bytes: {what}")
            if [action["oid"] for action in found] != [blob.digest[7:]]:
                raise RemoteError(self._where, "the hub does not describe how to send a large file")
            if not found[0].get("actions"):
                return 0
            lfs_upload(operation, found[0], token=False, endpoint=self._client.endpoint)
        return blob.size

    def commit(self, branch: str, parent: str, title: str, changes: Changes, message: str = "") -> str:
        """Commit to a branch that must still be at `parent`; return the id of the commit.

        Small files that the hub stores as large ones are uploaded first.

        Raises:
            ConflictError: The branch has moved.
            RefusedError: The model card is not UTF-8, which huggingface_hub requires.
        """
        small = {path: data for path, data in changes.items() if isinstance(data, bytes)}
        try:
            small.get("README.md", b"").decode()
        except UnicodeDecodeError as error:
            raise RefusedError(
                f"{self._where}: README.md", "a model card on a hub must be UTF-8", "Save it as UTF-8"
            ) from error
        operations: dict[str, Any] = {path: _operation(path, change) for path, change in changes.items()}
        for path in sorted(self.modes(parent, small)):
            data = small[path]
            blob = Descriptor("", sha256_bytes(data), len(data), path)
            self._send(blob, self._where, lambda start, data=data: io.BytesIO(data[start:]))  # type: ignore[misc]
            operations[path] = _addition(path, blob)
        with _calling(self._wire, self._where), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            made = self._api.create_commit(
                self._repo,
                operations.values(),
                commit_message=title,
                commit_description=message,
                revision=branch,
                parent_commit=parent,
            )
        self.warnings += [self._wire.clean(str(one.message)) for one in caught if one.category is UserWarning]
        commit = str(made.oid)
        if not is_hex(commit, COMMIT):
            raise RemoteError(self._where, "the hub does not return the id of the commit")
        return commit


def access(
    endpoint: str, token: str | None, org: str = "", *, pauses: Sequence[float] = PAUSES, proxy: ProxyOf = no_proxy
) -> Access:
    """The rights that a hub grants in an organization, or in the account of the token's owner.

    A token that is limited to single repositories does not tell which: then `writes` is None.

    Raises:
        RemoteError: No hub answers, or it refuses the token.
    """
    wire = HubWire.to(endpoint, token, pauses, proxy)
    try:
        with closing(wire), _calling(wire, endpoint):
            # The library insists on a token; the wire sends its own, or none.
            document = HfApi(endpoint=endpoint, token=False).whoami(token=token or "none")
    except DeniedError:
        if token:
            raise
        return Access("", "", reads=True, writes=False, why="it requires a login")
    try:
        name = str(document["name"])
        role = str(((document.get("auth") or {}).get("accessToken") or {}).get("role") or "")
        orgs = [str(one.get("name")) for one in document.get("orgs") or []]
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(endpoint, "not a Hugging Face hub") from error
    if org and org not in (name, *orgs):
        return Access(name, "its token", reads=True, writes=False, why=f"{name} is not in {org}")
    writes = {"write": True, "read": False}.get(role)
    return Access(name, "its token", reads=True, writes=writes, why="its token is read-only" if writes is False else "")


# ---- operations of a commit


def _operation(path: str, change: bytes | Descriptor | None) -> CommitOperationAdd | CommitOperationDelete:
    return CommitOperationDelete(path, is_folder=False) if change is None else _addition(path, change)


def _addition(path: str, content: bytes | Descriptor) -> CommitOperationAdd:
    """A file of a commit. It is marked as uploaded, or `create_commit` would send it itself, by Xet."""
    operation = CommitOperationAdd(path, content if isinstance(content, bytes) else b"")
    operation._upload_mode = "regular"
    if isinstance(content, Descriptor):
        operation._upload_mode = "lfs"
        operation.upload_info = UploadInfo(sha256=bytes.fromhex(content.digest[7:]), size=content.size, sample=b"")
    operation._is_uploaded = True
    return operation


# ---- large files


class _Outgoing(io.BufferedIOBase):
    """A blob as the file object that huggingface_hub wants: it only seeks in it, and the wire reads it in pieces."""

    def __init__(self, blob: Descriptor, where: str, opened: Callable[[int], AbstractContextManager[Reader]]) -> None:
        self.blob, self.where, self.opened = blob, where, opened
        self.states = {0: hashlib.sha256()}  # the hash of what comes before each piece
        self._at = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self.blob.size)[whence]
        return self._at

    def piece(self, size: int) -> _Piece:
        """The next `size` bytes, as the body of a request."""
        return _Piece(self, self._at, size)


class _Piece:
    """Some bytes of a blob, read again each time they are sent."""

    def __init__(self, file: _Outgoing, start: int, size: int) -> None:
        self._file, self._start, self._size = file, start, size

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[memoryview]:
        file, state, left = self._file, self._file.states[self._start].copy(), self._size
        with file.opened(self._start) as reader:
            buffers = [memoryview(bytearray(min(CHUNK, max(self._size, 1)))) for _ in range(2)]
            held = buffers[0][:0]  # until what follows it, and so at last the whole, is known to be right
            while left and (n := reader.readinto(buffers[0][:left])):
                if held:
                    yield held
                held = buffers[0][:n]
                state.update(held)
                left -= n
                buffers.reverse()
        whole = self._start + self._size == file.blob.size
        if left or (whole and f"sha256:{state.hexdigest()}" != file.blob.digest):
            what = f"other bytes were read than the {file.blob.size} of {file.blob.digest}"
            raise IntegrityError(file.where, what, "Nothing was stored", code="source-damaged")
        file.states[self._start + self._size] = state
        yield held


# ---- the library's requests over our own connection

_CALL: ContextVar[tuple[HubWire, str, _Outgoing | None] | None] = ContextVar("_CALL", default=None)


@contextmanager
def _calling(wire: HubWire, where: str, file: _Outgoing | None = None) -> Iterator[None]:
    """Send what huggingface_hub sends in this context and thread over `wire`, and make its errors one line.

    Raises:
        RemoteError: The hub's answer is not what the library expects.
    """
    session = get_session()
    if not isinstance(session.send, _Send):
        session.send = _Send(session.send)
    token = _CALL.set((wire, where, file))
    try:
        yield
    except _NONSENSE as error:
        reason = wire.clean(str(error).strip().partition("\n")[0]) or type(error).__name__
        raise RemoteError(where, f"the hub does not answer as huggingface_hub expects: {reason}") from error
    finally:
        _CALL.reset(token)


class _Send:
    """`httpx.Client.send` of the library's session, which it shares with everybody in this process."""

    def __init__(self, send: Callable[..., Any]) -> None:
        self._send = send

    def __call__(self, request: Any, **options: Any) -> Any:
        return _answered(request, *call) if (call := _CALL.get()) else self._send(request, **options)


def _answered(request: Any, wire: HubWire, where: str, file: _Outgoing | None) -> Any:
    """The response to a request of the library."""
    url, path = str(request.url), request.url.path
    if path.endswith("/api/agent-harnesses"):
        raise OSError("telemetry is off")
    if path.endswith("/api/validate-yaml"):
        where = f"{where}: README.md"
    headers = {name: request.headers[name] for name in ("accept", "content-type") if name in request.headers}
    body = file.piece(int(request.headers["content-length"])) if file and request.method == "PUT" else request.content
    answer = wire.ask(
        request.method,
        url,
        where,
        good=range(200, 300),
        headers=headers,
        body=body or None,
        limit=MAX_ANSWER,
        redirects=False,
    )
    kept = {name: answer.headers[name] for name in ("content-type", "etag") if name in answer.headers}
    return _HTTPX.Response(answer.status, headers=kept, content=answer.body, request=request)

"""Writes to a hub through huggingface_hub: repositories, branches, commits, large files, and the user's access rights.

The library builds the requests and reads the answers (`HfApi`, `lfs.py`); its requests are sent over our own connection
(`_send_over_wire`). So writing has the rules of reading: the token goes only to the hub's origin, answers have a limit and a
timeout, no redirect is followed, and proxies, retries and one-line errors are the same. The library's HTTP session is left
alone outside the calls made here, for others in this process who use it. Its user agent, its request for a list of agent
harnesses and its own search for a token are off.

Large files are sent with git-lfs, not with Xet. On loopback, 256 MiB took 1.15 s and 211 MiB of memory with Xet, 0.7 s and 28
MiB with git-lfs (huggingface_hub 2.4.0, hf-xet 1.8.0), and LoRA versions share no chunks that Xet could skip. hf-xet reads only
paths, while an adapter may come from a pack or from another registry; has an HTTP client of its own, without our limits and
timeouts; sends telemetry; keeps logs and a cache in HF_HOME; and fails on a hub without Xet. `CommitOperationAdd` alone would
read a file once more to hash it before it is sent: 1.2 to 1.8 s instead of 0.8. Here the digest is known, and is checked while
sending: the last byte of a file is sent only after all bytes were verified, so a hub never gets a complete file of wrong bytes.
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
from adapterhub.http.http_errors import DeniedError
from adapterhub.http.urls import ProxyOf, no_proxy
from adapterhub.manifest.oci_manifest import Descriptor
from adapterhub.remotes.download import ResumingReader
from adapterhub.remotes.protocol import Reader, Source
from adapterhub.remotes.remote_address import Access
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import ConflictError, FormatError, IntegrityError, RefusedError, RemoteError

from .hub_client import COMMIT, MAX_ANSWER, HubClient, HubWire

_HTTPX: Any = importlib.import_module(HfHubHTTPError.__mro__[1].__module__)  # httpx; httpx2 since huggingface_hub 2.0
_UNREADABLE_ANSWER = (
    ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError, _HTTPX.InvalidURL, _HTTPX.HTTPError
)  # fmt: skip
"""The exceptions that the library raises for an answer that it cannot read."""
Changes = Mapping[str, bytes | Descriptor | None]
"""Path to the new bytes of a file, to a large file that was uploaded, or to None for a file to remove."""
_SAMPLE_SIZE = 512  # bytes of a file from which the hub decides how to store it
_MAX_SAMPLES = 256  # files in one request about that


class HubWriter:
    """Write access to one repository on a hub.

    Attributes:
        warnings: The hub's remarks about the model card.
    """

    def __init__(self, client: HubClient) -> None:
        self._client, self._wire, self._label, self._repo = client, client.wire, client.location, client.repo
        self._api = HfApi(endpoint=client.endpoint, token=False)  # the wire has the token
        self.warnings: list[str] = []

    def create(self, *, private: bool = False) -> bool:
        """Create the repository, private or with the hub's default visibility, and return whether it is new."""
        try:
            with _library_calls(self._wire, self._label):
                self._api.create_repo(self._repo, private=True if private else None)
        except ConflictError:
            return False
        return True

    def create_branch(self, name: str, start: str) -> None:
        """Create a branch at a commit.

        Raises:
            ConflictError: It exists.
        """
        with _library_calls(self._wire, f"{self._label}@{name}"):
            self._api.create_branch(self._repo, branch=name, revision=start)

    def delete_branch(self, name: str) -> None:
        """Delete a branch."""
        with _library_calls(self._wire, f"{self._label}@{name}"):
            self._api.delete_branch(self._repo, branch=name)

    def paths_stored_large(self, revision: str, files: Mapping[str, bytes]) -> set[str]:
        """Return the paths of the files that the hub wants as large files.

        `HfApi.preupload_lfs_files` would ask the same, and send them by Xet at once.
        """
        samples = [
            {"path": path, "size": len(data), "sample": base64.b64encode(data[:_SAMPLE_SIZE]).decode()}
            for path, data in files.items()
        ]
        large: set[str] = set()
        url, headers = f"{self._client.url}/preupload/{quote(revision, safe='')}", {"Content-Type": "application/json"}
        for start in range(0, len(samples), _MAX_SAMPLES):
            body = json.dumps({"files": samples[start : start + _MAX_SAMPLES]}).encode()
            response = self._wire.request("POST", url, self._label, good=(200,), headers=headers, body=body, limit=MAX_ANSWER)
            entries = json_file.parse_object(response.body, self._label).get("files")
            for entry in entries if isinstance(entries, list) else []:
                if isinstance(entry, dict) and entry.get("uploadMode") == "lfs":
                    large.add(str(entry.get("path")))
        return {path for path in large if files.get(path)}  # an empty file is never a large one

    def upload(self, blob: Descriptor, source: Source) -> int:
        """Store a blob of `source` as a large file; return how many bytes were sent, 0 if the hub has it.

        Raises:
            IntegrityError: The bytes of the source do not have the blob's digest; the hub stores no such file.
        """
        return self._send(blob, source.location, lambda start: ResumingReader(source, blob, start, pauses=self._client.pauses))

    def _send(self, blob: Descriptor, origin: str, open_at: Callable[[int], AbstractContextManager[Reader]]) -> int:
        """Send a blob as a large file, reading it with `open_at(offset)`; return how many bytes were sent."""
        path = blob.path or blob.digest
        file = _OutgoingFile(blob, f"{origin}: {path}", open_at)
        operation = _addition(path, blob)
        operation.path_or_fileobj = file
        repository = {"repo_type": "model", "repo_id": self._repo, "endpoint": self._client.endpoint}
        with _library_calls(self._wire, f"{self._label}: {path}", file):
            actions, errors, *_ = post_lfs_batch_info([operation.upload_info], token=False, **repository)
            if errors:
                problem = self._wire.clean(errors[0]["error"]["message"])
                raise RemoteError(self._label, f"the hub refuses a file of {blob.size} bytes: {problem}")
            if [entry["oid"] for entry in actions] != [blob.digest[7:]]:
                raise RemoteError(self._label, "the hub does not describe how to send a large file")
            if not actions[0].get("actions"):
                return 0
            lfs_upload(operation, actions[0], token=False, endpoint=self._client.endpoint)
        return blob.size

    def create_commit(self, branch: str, parent: str, title: str, changes: Changes, message: str = "") -> str:
        """Commit to a branch that must still be at `parent`, and return the id of the new commit.

        Small files that the hub stores as large ones are uploaded first.

        Raises:
            ConflictError: The branch has moved.
            RefusedError: The model card is not UTF-8, which huggingface_hub requires.
        """
        small_files = {path: data for path, data in changes.items() if isinstance(data, bytes)}
        try:
            small_files.get("README.md", b"").decode()
        except UnicodeDecodeError as error:
            raise RefusedError(
                f"{self._label}: README.md", "a model card on a hub must be UTF-8", "Save it as UTF-8"
            ) from error
        operations: dict[str, Any] = {path: _commit_operation(path, change) for path, change in changes.items()}
        for path in sorted(self.paths_stored_large(parent, small_files)):
            data = small_files[path]
            blob = Descriptor("", sha256_bytes(data), len(data), path)
            self._send(blob, self._label, lambda start, data=data: io.BytesIO(data[start:]))  # type: ignore[misc]
            operations[path] = _addition(path, blob)
        # The library reports the hub's remarks about the model card as warnings.
        with _library_calls(self._wire, self._label), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            commit_info = self._api.create_commit(
                self._repo,
                operations.values(),
                commit_message=title,
                commit_description=message,
                revision=branch,
                parent_commit=parent,
            )
        self.warnings += [self._wire.clean(str(warning.message)) for warning in caught if warning.category is UserWarning]
        commit_id = str(commit_info.oid)
        if not is_hex(commit_id, COMMIT):
            raise RemoteError(self._label, "the hub does not return the id of the commit")
        return commit_id


def access(
    endpoint: str, token: str | None, org: str = "", *, pauses: Sequence[float] = PAUSES, proxy: ProxyOf = no_proxy
) -> Access:
    """Return the rights that a hub grants in an organization, or in the account of the token's owner.

    A token that is limited to single repositories does not say which: then `writes` is None.

    Raises:
        RemoteError: No hub answers, or it refuses the token.
    """
    wire = HubWire.open(endpoint, token, pauses, proxy)
    try:
        with closing(wire), _library_calls(wire, endpoint):
            # The library insists on a token; the wire sends its own, or none.
            document = HfApi(endpoint=endpoint, token=False).whoami(token=token or "none")
    except DeniedError:
        if token:
            raise
        return Access("", "", reads=True, writes=False, reason="it requires a login")
    try:
        name = str(document["name"])
        role = str(((document.get("auth") or {}).get("accessToken") or {}).get("role") or "")
        orgs = [str(organization.get("name")) for organization in document.get("orgs") or []]
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(endpoint, "not a Hugging Face hub") from error
    if org and org not in (name, *orgs):
        return Access(name, "its token", reads=True, writes=False, reason=f"{name} is not in {org}")
    writes = {"write": True, "read": False}.get(role)
    return Access(name, "its token", reads=True, writes=writes, reason="its token is read-only" if writes is False else "")


# ---- operations of a commit


def _commit_operation(path: str, change: bytes | Descriptor | None) -> CommitOperationAdd | CommitOperationDelete:
    return CommitOperationDelete(path, is_folder=False) if change is None else _addition(path, change)


def _addition(path: str, content: bytes | Descriptor) -> CommitOperationAdd:
    """Return the operation that adds a file. Marked as uploaded, or `create_commit` would send it itself, by Xet."""
    operation = CommitOperationAdd(path, content if isinstance(content, bytes) else b"")
    operation._upload_mode = "regular"
    if isinstance(content, Descriptor):
        operation._upload_mode = "lfs"
        operation.upload_info = UploadInfo(sha256=bytes.fromhex(content.digest[7:]), size=content.size, sample=b"")
    operation._is_uploaded = True
    return operation


# ---- large files


class _OutgoingFile(io.BufferedIOBase):
    """A blob as the file object that huggingface_hub wants: the library only seeks in it, and the wire reads it in pieces."""

    def __init__(self, blob: Descriptor, location: str, open_at: Callable[[int], AbstractContextManager[Reader]]) -> None:
        self.blob, self.location, self.open_at = blob, location, open_at
        self.states = {0: hashlib.sha256()}  # by offset: the hash of the bytes before it
        self._at = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self.blob.size)[whence]
        return self._at

    def next_piece(self, size: int) -> _Piece:
        """Return the next `size` bytes, as the body of a request."""
        return _Piece(self, self._at, size)


class _Piece:
    """A range of a blob's bytes, read again each time it is sent."""

    def __init__(self, file: _OutgoingFile, start: int, size: int) -> None:
        self._file, self._start, self._size = file, start, size

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[memoryview]:
        file, state, bytes_left = self._file, self._file.states[self._start].copy(), self._size
        with file.open_at(self._start) as reader:
            buffers = [memoryview(bytearray(min(CHUNK, max(self._size, 1)))) for _ in range(2)]
            # Each chunk waits for the next, and the last one for the digest: see the module's docstring.
            pending = buffers[0][:0]
            while bytes_left and (count := reader.readinto(buffers[0][:bytes_left])):
                if pending:
                    yield pending
                pending = buffers[0][:count]
                state.update(pending)
                bytes_left -= count
                buffers.reverse()
        is_last = self._start + self._size == file.blob.size
        if bytes_left or (is_last and f"sha256:{state.hexdigest()}" != file.blob.digest):
            problem = f"other bytes were read than the {file.blob.size} of {file.blob.digest}"
            raise IntegrityError(file.location, problem, "Nothing was stored", code="source-damaged")
        file.states[self._start + self._size] = state
        yield pending


# ---- the library's requests over our own connection

_CALL: ContextVar[tuple[HubWire, str, _OutgoingFile | None] | None] = ContextVar("_CALL", default=None)


@contextmanager
def _library_calls(wire: HubWire, location: str, file: _OutgoingFile | None = None) -> Iterator[None]:
    """Send the library's requests in this context and thread over `wire`, and turn its errors into one line.

    Raises:
        RemoteError: The hub's answer is not what the library expects.
    """
    session = get_session()
    if not isinstance(session.send, _RoutedSend):
        session.send = _RoutedSend(session.send)
    token = _CALL.set((wire, location, file))
    try:
        yield
    except _UNREADABLE_ANSWER as error:
        reason = wire.clean(str(error).strip().partition("\n")[0]) or type(error).__name__
        raise RemoteError(location, f"the hub does not answer as huggingface_hub expects: {reason}") from error
    finally:
        _CALL.reset(token)


class _RoutedSend:
    """A replacement of `httpx.Client.send` in the library's session, which all code in this process shares."""

    def __init__(self, send: Callable[..., Any]) -> None:
        self._send = send

    def __call__(self, request: Any, **options: Any) -> Any:
        return _send_over_wire(request, *call) if (call := _CALL.get()) else self._send(request, **options)


def _send_over_wire(request: Any, wire: HubWire, location: str, file: _OutgoingFile | None) -> Any:
    """Send a request of the library over `wire`, and return the response."""
    url, path = str(request.url), request.url.path
    if path.endswith("/api/agent-harnesses"):
        raise OSError("telemetry is off")
    if path.endswith("/api/validate-yaml"):
        location = f"{location}: README.md"
    headers = {name: request.headers[name] for name in ("accept", "content-type") if name in request.headers}
    body = file.next_piece(int(request.headers["content-length"])) if file and request.method == "PUT" else request.content
    response = wire.request(
        request.method,
        url,
        location,
        good=range(200, 300),
        headers=headers,
        body=body or None,
        limit=MAX_ANSWER,
        redirects=False,
    )
    headers_kept = {name: response.headers[name] for name in ("content-type", "etag") if name in response.headers}
    return _HTTPX.Response(response.status, headers=headers_kept, content=response.body, request=request)

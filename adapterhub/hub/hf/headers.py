"""GET …/safetensors-metadata/{file}: the headers of weights in one response, instead of a range request per file."""

from __future__ import annotations

from typing import Any, BinaryIO

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.hub import commits
from adapterhub.hub.commits import Commit
from adapterhub.hub.hub import Hub
from adapterhub.hub.workers import Worker
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, RefusedError

from .hf_errors import ENTRY, ResponseError
from .reading import commit_at, name_of, visible_view

_INDEX = ".safetensors.index.json"
_MAX_INDEX, _MAX_HEADERS = 4 << 20, 16 << 20  # bytes of an index, and of all headers in one response


async def headers(hub: Hub, request: Request) -> Response:
    """GET …/safetensors-metadata/{path}: the headers of a file on branch main, or of the shards an index file names."""
    identity, name, path = hub.identify(request), name_of(request), request.path_params["path"]

    def work(worker: Worker) -> dict[str, Any]:
        view = visible_view(worker, hub, identity, name)
        hub.access.check_files(identity, name)
        commit = commit_at(worker, view, commits.HEAD)
        folder, slash, file = path.rpartition("/")
        index, shards = _read_index(hub, commit, path) if file.endswith(_INDEX) else ({}, [file])
        read, remaining = {}, _MAX_HEADERS
        for shard in shards:
            read[shard], size = _header(hub, commit, folder + slash + shard, remaining)
            remaining -= size
        return {"index": index, "headers": read}

    return JSONResponse(await hub.workers.run(work))


def _file(commit: Commit, path: str) -> tuple[str, int]:
    if path not in commit.files:
        raise ResponseError(404, ENTRY, f"{path}: no such file", {"x-repo-commit": commit.id})
    return commit.files[path]


def _read_index(hub: Hub, commit: Commit, path: str) -> tuple[dict[str, Any], list[str]]:
    """Return what an index says besides the map of tensors to shards, and the names of the shards."""
    digest, size = _file(commit, path)
    # The index is a file of a client: it may have any size.
    if size > _MAX_INDEX:
        raise RefusedError(path, f"an index of over {_MAX_INDEX:,} bytes")
    index = json_file.parse_object(hub.store.read_document(digest), path)
    shards = index.pop("weight_map", None)
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise FormatError(path, "not an index of shards")
    return index, list(dict.fromkeys(shards.values()))


def _header(hub: Hub, commit: Commit, path: str, limit: int) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file as stored, and its size in bytes.

    Raises:
        RefusedError: It has more than `limit` bytes.
    """
    from adapterhub_converters.containers import safetensors_header

    digest, size = _file(commit, path)
    with hub.storage.open_blob(digest) as file:
        raw = _read(file, 8)
        length = int.from_bytes(raw, "little")
        # The length is a claim of the file: check it before reading that much.
        if length > limit:
            raise RefusedError(path, f"headers of over {_MAX_HEADERS:,} bytes; read them by ranges of the files")
        raw += _read(file, length)
    header = safetensors_header.read_header(lambda start, count: raw[start : start + count], size, path)
    tensors = {
        tensor.name: {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [tensor.offset - header.data_start, tensor.offset - header.data_start + tensor.size],
        }
        for tensor in header.tensors.values()
    }
    return ({"__metadata__": header.metadata} if header.metadata else {}) | tensors, len(raw)


def _read(file: BinaryIO, size: int) -> bytes:
    """Return the next `size` bytes of a file, fewer at its end."""
    pieces = []
    while size and (piece := file.read(size)):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)

"""A base at an address, `https://…`, `http://…` or `hf://org/model[@revision][/file]`, read from its headers.

Two endpoints of a Hugging Face Hub are enough, used as huggingface_hub does: `/api/models/{id}/revision/{revision}?blobs=true`
for the commit, the files, their sizes and the digests of large ones, and `/{id}/resolve/{commit}/{path}` for bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from adapterhub.digest import is_hex
from adapterhub.http.client import PAUSES
from adapterhub.http.urls import origin
from adapterhub_converters.bases import BaseSpec, hub_layout, read_files
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, NotFoundError, RemoteError

from .hub_address import SCHEME, Hub, HubPath
from .ranges import ListedFile, RangeClient, WebFiles

_FILES = (".gguf", ".safetensors", ".json")
_MAX_LISTING = 64_000_000  # bytes


def read_url(text: str, hub: Hub, *, pauses: Sequence[float] = PAUSES) -> BaseSpec:
    """Read the base at an address; its `fetched` is the number of bytes downloaded.

    Raises:
        NotFoundError: There is nothing at the address, or no base.
        RemoteError: The server refused, failed, or gave an invalid answer.
    """
    hub_path = HubPath.parse(text) if text.lower().startswith(SCHEME) else HubPath.from_page(text, hub)
    at_hub = hub_path or origin(text, text) == origin(hub.endpoint, hub.endpoint)
    client = RangeClient.for_hub(hub, pauses) if at_hub else RangeClient(text, pauses=pauses, proxy=hub.proxy)
    with contextlib.closing(client):
        spec = _read_hub(hub_path, hub, client) if hub_path else _read_plain(text, client)
    return dataclasses.replace(spec, fetched=client.fetched)


def _read_plain(url: str, client: RangeClient) -> BaseSpec:
    # The query may be a signature, so names in reports do not include it.
    url_parts = urlsplit(url)
    folder, _, name = url_parts.path.rpartition("/")
    if not name.endswith(_FILES):
        folder, name = url_parts.path.rstrip("/"), ""

    def address(name: str) -> str:
        return urlunsplit((url_parts.scheme, url_parts.netloc, f"{folder}/{name}", url_parts.query, ""))

    def label(name: str) -> str:
        return urlunsplit((url_parts.scheme, url_parts.netloc, f"{folder}/{name}".rstrip("/"), "", ""))

    files = WebFiles(client, address, label, needed=(name or "config.json",))
    try:
        return read_files(files, name)
    except NotFoundError as error:
        if name or error.where != label("config.json"):
            raise
        problem = "not a base model: there is no config.json"
        raise NotFoundError(label(""), problem, "Name a .gguf, a .safetensors or an index.json") from error


def _read_hub(hub_path: HubPath, hub: Hub, client: RangeClient) -> BaseSpec:
    """Read the base at a path on a hub; its revision is the commit that the path currently means."""
    commit, listing = list_files(hub_path, hub, client)
    folder, name = _split_path(hub_path, listing)
    folder_listing = {path.removeprefix(folder): listed for path, listed in listing.items() if path.startswith(folder)}
    root = f"{hub.endpoint}/{hub_path.repo}/resolve/{commit}/"
    model = dataclasses.replace(hub_path, path="")
    files = WebFiles(
        client,
        lambda name: root + quote(folder + name),
        lambda name: f"{model}/{folder}{name}".rstrip("/"),
        listing={name: listed for name, listed in folder_listing.items() if "/" not in name},
        needed=folder_listing,
    )
    if not name and "config.json" not in folder_listing:
        raise NotFoundError(
            str(hub_path), "not a base model: there is no config.json", _weight_file_hint(model, listing), code="not-a-base"
        )
    return hub_layout.with_repo(read_files(files, name), hub_path.repo, commit)


def _split_path(hub_path: HubPath, listing: Mapping[str, ListedFile]) -> tuple[str, str]:
    """Return the folder in the model, empty or ending with a slash, and the file in it, empty if none is named."""
    if hub_path.path in listing:
        folder, _, name = hub_path.path.rpartition("/")
        return (f"{folder}/" if folder else ""), name
    if hub_path.path and not any(path.startswith(f"{hub_path.path}/") for path in listing):
        model = dataclasses.replace(hub_path, path="")
        raise NotFoundError(str(hub_path), "no such file in this model", _weight_file_hint(model, listing), code="no-such-file")
    return (f"{hub_path.path}/" if hub_path.path else ""), ""


def _weight_file_hint(model: HubPath, listing: Mapping[str, ListedFile]) -> str:
    weight_files = sorted(path for path in listing if path.endswith((".gguf", ".safetensors")))
    return f"Name one of its {len(weight_files)} weight files, such as {model}/{weight_files[0]}" if weight_files else ""


def list_files(hub_path: HubPath, hub: Hub, client: RangeClient) -> tuple[str, dict[str, ListedFile]]:
    """Return the commit that `hub_path` currently means, and the files of the model by path."""
    location = str(dataclasses.replace(hub_path, path=""))
    url = f"{hub.endpoint}/api/models/{hub_path.repo}/revision/{quote(hub_path.revision, safe='')}?blobs=true"
    raw = client.get(url, location, n=_MAX_LISTING).body
    try:
        document = json_file.parse_object(raw.decode(), location)
    except (FormatError, UnicodeDecodeError) as error:
        raise RemoteError(location, f"{hub.endpoint} is not a Hugging Face Hub", "Is HF_ENDPOINT right?") from error
    commit, siblings = document.get("sha"), document.get("siblings")
    if not isinstance(commit, str) or not is_hex(commit, 40) or not isinstance(siblings, list):
        raise RemoteError(location, f"{hub.endpoint} does not list the files of a commit", "Is HF_ENDPOINT right?")
    return commit, {entry["rfilename"]: _listed_file(entry) for entry in siblings if _is_file(entry)}


def _is_file(entry: object) -> bool:
    name = entry.get("rfilename") if isinstance(entry, dict) else None
    # Names become parts of URLs and paths, and must not lead out of the model.
    return isinstance(name, str) and name.isprintable() and all(part not in ("", ".", "..") for part in name.split("/"))


def _listed_file(entry: Mapping[str, Any]) -> ListedFile:
    # The listing has digests only for files in LFS.
    lfs = entry.get("lfs")
    lfs_entry = lfs if isinstance(lfs, dict) else {}
    size, digest = lfs_entry.get("size", entry.get("size")), lfs_entry.get("sha256")
    is_valid = json_file.is_integer(size) and size >= 0
    return ListedFile(size if is_valid else None, f"sha256:{digest}" if isinstance(digest, str) and is_hex(digest) else None)

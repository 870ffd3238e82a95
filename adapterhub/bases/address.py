"""An address of a base: `https://…`, `http://…` or `hf://…`, read from headers by ranges of bytes."""

from __future__ import annotations

import contextlib
import dataclasses
from urllib.parse import urlsplit, urlunsplit

from adapterhub.http.urls import origin
from adapterhub_converters.bases import BaseSpec, read_files
from adapterhub_converters.errors import NotFoundError

from . import hub as _hub
from .client import RangeClient
from .hub_address import SCHEME, Hub, Place
from .web import WebFiles

_FILES = (".gguf", ".safetensors", ".json")


def read_url(text: str, hub: Hub, *, client: RangeClient | None = None) -> BaseSpec:
    """The base at an address, `https://…`, `http://…` or `hf://…`; `fetched` says how many bytes that took.

    Raises:
        NotFoundError: Nothing is there, or no base.
        RemoteError: The server refused, failed, or answered what cannot be true.
    """
    client = client or RangeClient.of(hub)
    with contextlib.closing(client):
        place = Place.parse(text) if text.lower().startswith(SCHEME) else Place.of_page(text, hub)
        spec = _hub.read(place, hub, client) if place else _read_plain(text, client)
    return dataclasses.replace(spec, fetched=client.fetched)


def _read_plain(url: str, client: RangeClient) -> BaseSpec:
    # Whatever is asked for in the address, a signature perhaps, is no part of the name in reports.
    origin(url, url.partition("?")[0], typed=True)
    parts = urlsplit(url)
    folder, _, name = parts.path.rpartition("/")
    if not name.endswith(_FILES):
        folder, name = parts.path.rstrip("/"), ""

    def address(name: str) -> str:
        return urlunsplit((parts.scheme, parts.netloc, f"{folder}/{name}", parts.query, ""))

    def label(name: str) -> str:
        return urlunsplit((parts.scheme, parts.netloc, f"{folder}/{name}".rstrip("/"), "", ""))

    files = WebFiles(client, address, label, needed=(name or "config.json",))
    try:
        return read_files(files, name)
    except NotFoundError as error:
        if name or error.where != label("config.json"):
            raise
        what = "not a base model: there is no config.json"
        raise NotFoundError(label(""), what, "Name a .gguf, a .safetensors or an index.json") from error

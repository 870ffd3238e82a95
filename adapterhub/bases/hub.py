"""Models on a Hugging Face Hub, or on what answers like one: `hf://org/model[@revision][/file]`.

Two endpoints are all it takes, those that huggingface_hub uses itself: `/api/models/{id}/revision/{revision}?blobs=true` for
the commit, the files, their sizes and the digests of large ones, and `/{id}/resolve/{commit}/{path}` for bytes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from adapterhub_converters.base import BaseSpec, read_files
from adapterhub_converters.errors import FormatError, NotFoundError, RemoteError, UsageError
from adapterhub_converters.files import json_file

from .client import Client, origin
from .web import Known, WebFiles

ENDPOINT = "https://huggingface.co"
SCHEME = "hf://"
MAIN = "main"
_MAX_LISTING = 64_000_000  # bytes
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PLACE = re.compile(
    r"(?P<repo>[^/@]+/[^/@]+|[^/@]+(?=@|/?$))(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<path>.*))?"
)
# A page of a model, or a file of it, as a browser shows its address.
_PAGE = re.compile(r"/(?P<repo>[^/]+/[^/]+)(?:/(?:tree|blob|resolve)/(?P<revision>[^/]+)(?P<path>/.*)?)?/?")
_NO_MODELS = ("datasets", "spaces", "api", "docs", "collections", "papers", "blog")


@dataclass(frozen=True, slots=True)
class Hub:
    """Which hub is meant and who asks."""

    endpoint: str = ENDPOINT
    token: str | None = None

    def client(self) -> Client:
        """One that gives the token to this hub alone."""
        return Client(token=self.token, origin=origin(self.endpoint, self.endpoint))


@dataclass(frozen=True, slots=True)
class Place:
    """A model, a revision of it (a branch, a tag, a commit), and a file or folder in it, empty for the whole."""

    repo: str
    revision: str = MAIN
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Place:
        """What `hf://…` says."""
        found = _PLACE.fullmatch(text[len(SCHEME) :])
        hint = "Write it like hf://org/model, hf://org/model@revision or hf://org/model/file.gguf"
        if not found:
            raise UsageError(text, "not a model on a hub", hint)
        repo, revision = found["repo"], unquote(found["revision"] or MAIN)
        path = (found["path"] or "").strip("/")
        if not _ID.fullmatch(repo) or len(repo) > 96 or "--" in repo or ".." in repo:
            raise UsageError(text, f"{repo[:100]!r} cannot be the name of a model", hint)
        if not revision.isprintable() or any(part in ("", ".", "..") for part in path.split("/") if path):
            raise UsageError(text, "a revision or a path that there cannot be", hint)
        return cls(repo, revision, path)

    @classmethod
    def of_page(cls, url: str, hub: Hub) -> Place | None:
        """What a page or file of this hub shows; None for an address that is none of its models'."""
        where = url.partition("?")[0]
        if origin(url, where) != origin(hub.endpoint, hub.endpoint):
            return None
        found = _PAGE.fullmatch(urlsplit(url).path)
        if not found or found["repo"].split("/")[0] in _NO_MODELS:
            return None
        tail = unquote(found["path"] or "")
        revision = f"@{found['revision']}" if found["revision"] else ""
        return cls.parse(f"{SCHEME}{found['repo']}{revision}{tail}")

    def __str__(self) -> str:
        revision = f"@{quote(self.revision, safe='')}" if self.revision != MAIN else ""
        return f"hf://{self.repo}{revision}" + (f"/{self.path}" if self.path else "")


def read(place: Place, hub: Hub, client: Client) -> BaseSpec:
    """The base at a place on a hub, its revision the commit that `place` names now."""
    commit, listing = _listing(place, hub, client)
    folder, name = _split(place, listing)
    there = {path.removeprefix(folder): known for path, known in listing.items() if path.startswith(folder)}
    root = f"{hub.endpoint}/{place.repo}/resolve/{commit}/"
    top = dataclasses.replace(place, path="")
    files = WebFiles(
        client,
        lambda name: root + quote(folder + name),
        lambda name: f"{top}/{folder}{name}".rstrip("/"),
        listing={name: known for name, known in there.items() if "/" not in name},
        needed=there,
    )
    if not name and "config.json" not in there:
        raise NotFoundError(str(place), "not a base model: there is no config.json", _instead(top, listing))
    return _named(read_files(files, name), place.repo, commit)


def _named(spec: BaseSpec, repo: str, commit: str) -> BaseSpec:
    """With the model's name and commit; a GGUF that names the model it was made of keeps that, whose commit is unknown."""
    if spec.kind == "gguf" and spec.repo and spec.repo != repo:
        return spec
    return dataclasses.replace(spec, repo=repo, revision=commit)


def _split(place: Place, listing: Mapping[str, Known]) -> tuple[str, str]:
    """The folder in the model, empty or with a slash at its end, and the file in it, if one is named."""
    if place.path in listing:
        folder, _, name = place.path.rpartition("/")
        return (f"{folder}/" if folder else ""), name
    if place.path and not any(path.startswith(f"{place.path}/") for path in listing):
        top = dataclasses.replace(place, path="")
        raise NotFoundError(str(place), "no such file in this model", _instead(top, listing))
    return (f"{place.path}/" if place.path else ""), ""


def _instead(top: Place, listing: Mapping[str, Known]) -> str:
    found = sorted(path for path in listing if path.endswith((".gguf", ".safetensors")))
    return f"Name one of its {len(found)} files of weights, like {top}/{found[0]}" if found else ""


def _listing(place: Place, hub: Hub, client: Client) -> tuple[str, dict[str, Known]]:
    where = str(dataclasses.replace(place, path=""))
    url = f"{hub.endpoint}/api/models/{place.repo}/revision/{quote(place.revision, safe='')}?blobs=true"
    raw = client.get(url, where, n=_MAX_LISTING).body
    try:
        document = json_file.parse_object(raw.decode(), where)
    except (FormatError, UnicodeDecodeError) as error:
        raise RemoteError(where, f"{hub.endpoint} does not answer as a hub does", "Is HF_ENDPOINT right?") from error
    commit, siblings = document.get("sha"), document.get("siblings")
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit) or not isinstance(siblings, list):
        raise RemoteError(where, f"{hub.endpoint} says neither the commit nor the files of it", "Is HF_ENDPOINT right?")
    return commit, {entry["rfilename"]: _known(entry) for entry in siblings if _is_file(entry)}


def _is_file(entry: object) -> bool:
    name = entry.get("rfilename") if isinstance(entry, dict) else None
    return isinstance(name, str) and name.isprintable() and all(part not in ("", ".", "..") for part in name.split("/"))


def _known(entry: Mapping[str, Any]) -> Known:
    lfs = entry.get("lfs")
    large = lfs if isinstance(lfs, dict) else {}
    size, digest = large.get("size", entry.get("size")), large.get("sha256")
    right = isinstance(size, int) and not isinstance(size, bool) and size >= 0
    return Known(size if right else None, f"sha256:{digest}" if isinstance(digest, str) and _SHA256.fullmatch(digest) else None)

"""Repositories, commits and files as the JSON that clients of the Hugging Face Hub parse (`hf_api.py` of huggingface_hub)."""

from __future__ import annotations

import posixpath
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adapterhub.hub.commits import Commit, View
from adapterhub.hub.git_objects import GitFile
from adapterhub.index.queries import VersionRow
from adapterhub.manifest.card import Card


def with_milliseconds(moment: str) -> str:
    """Return a registry time with the milliseconds that old clients require."""
    return f"{moment.removesuffix('Z')}.000Z" if moment else "1970-01-01T00:00:00.000Z"


def time_of(seconds: float) -> str:
    """Return a time in seconds since the epoch as documents have it."""
    return with_milliseconds(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds)))


Facets = Mapping[str, Sequence[str]]
"""What the index has of a version: kind of facet to values (`index.version_extract`)."""
EXPANDABLE = (
    "author", "baseModels", "cardData", "createdAt", "disabled", "downloads", "gated", "lastModified", "library_name", "likes",
    "pipeline_tag", "private", "safetensors", "sha", "siblings", "tags", "usedStorage",
)  # fmt: skip
"""Fields that a client may ask for by name, as `expand`; the Hub has more."""
TAG_KINDS = ("tag", "library", "container", "method", "pipeline", "language")
"""Kinds of facets that are tags as they are."""
PREFIXED_KINDS = {"base": ("base_model:", "base_model:adapter:"), "license": ("license:",), "dataset": ("dataset:",)}
"""Other kinds of facets that are tags, and what comes before the value."""


def model_info(
    view: View,
    commit: Commit,
    files: Sequence[GitFile],
    card: Card | None,
    facets: Facets,
    *,
    created: str = "",
    blobs: bool = False,
) -> dict[str, Any]:
    """Return a repository at a commit (`ModelInfo`)."""
    row = commit.row
    document = summary(view, row, commit.id, facets, created)
    document["cardData"] = card_data(card, row, facets)
    document["siblings"] = siblings(files, blobs=blobs)
    document["usedStorage"] = sum(file.size for file in files)
    document["adapterhub"] = {"digest": row.digest, "number": row.number} if row else {}
    return document


def summary(view: View, row: VersionRow | None, sha: str, facets: Facets, first_push: str = "") -> dict[str, Any]:
    """Return a repository as an entry of a list; `first_push` is the time of its first version."""
    repository, name = view.repository, view.name
    changed = row.time if row else repository.created if repository else ""
    created = min(filter(None, (repository.created if repository else "", first_push, changed)), default="")
    document: dict[str, Any] = {
        # The Hub's ids have 24 hexadecimal digits.
        "_id": sha[:24],
        "id": name,
        "modelId": name,
        "author": name.partition("/")[0],
        "sha": sha,
        "private": bool(repository and repository.private),
        # Callers set these, which change without the repository.
        "downloads": 0,
        "likes": 0,
        "gated": False,
        "disabled": False,  # which clients expect, and nothing here is
        "createdAt": with_milliseconds(created),
        "lastModified": with_milliseconds(changed),
        "library_name": next(iter(facets.get("library", ())), None),
        "pipeline_tag": next(iter(facets.get("pipeline", ())), None),
        "tags": tags(facets),
    }
    if row and row.parameters and row.dtype and row.format != "gguf":
        document["safetensors"] = {"parameters": {row.dtype: row.parameters}, "total": row.parameters}
    if row and row.base:
        document["baseModels"] = {"relation": "adapter", "models": [{"_id": row.base, "id": row.base}]}
    return document


def tags(facets: Facets) -> list[str]:
    """Return the tags that repositories are filtered by (`model_filters`)."""
    all_tags = [value for kind in TAG_KINDS for value in facets.get(kind, ())]
    all_tags += [
        f"{prefix}{value}" for kind, prefixes in PREFIXED_KINDS.items() for value in facets.get(kind, ()) for prefix in prefixes
    ]
    return list(dict.fromkeys(all_tags))


def tag(kind: str, value: str) -> str:
    """Return the tag for a facet."""
    return f"{PREFIXED_KINDS.get(kind, ('',))[0]}{value}"


def only(document: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a model that a client asks for by name, with those that name it; all if it asks for none."""
    return {key: value for key, value in document.items() if key in ("_id", "id", *fields)} if fields else document


def card_data(card: Card | None, row: VersionRow | None, facets: Facets) -> dict[str, Any]:
    """Return the front matter of the model card, with facts of the adapter where the card says nothing."""
    data: dict[str, Any] = {}
    for key, values in (card.fields if card else {}).items():
        data[key] = values[0] if len(values) == 1 else list(values)
    for key in ("tags", "language"):
        if isinstance(data.get(key), str):
            data[key] = [data[key]]
    if row:
        library = next(iter(facets.get("library", ())), None)
        for key, value in {"base_model": row.base, "license": row.license, "library_name": library}.items():
            if value:
                data.setdefault(key, value)
    return data


def siblings(files: Sequence[GitFile], *, blobs: bool = False) -> list[dict[str, Any]]:
    """Return the files of a repository for its summary; with sizes and ids if `blobs`."""
    return [_sibling(file, blobs=blobs) for file in files]


def _sibling(file: GitFile, *, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": file.path}
    sibling: dict[str, Any] = {"rfilename": file.path, "size": file.size, "blobId": file.oid}
    if file.lfs:
        sibling["lfs"] = {"sha256": file.lfs, "size": file.size, "pointerSize": file.pointer}
    return sibling


def file_entry(file: GitFile, commit: Commit | None = None) -> dict[str, Any]:
    """Return a file of a tree; with its commit for `expand`."""
    document: dict[str, Any] = {"type": "file", "oid": file.oid, "size": file.size, "path": file.path}
    if file.lfs:
        document["lfs"] = {"oid": file.lfs, "size": file.size, "pointerSize": file.pointer}
    if commit:
        document["lastCommit"] = last_commit(commit)
    return document


def folder_entry(path: str, commit: Commit) -> dict[str, Any]:
    """Return a folder of a tree."""
    return {"type": "directory", "oid": commit.id, "size": 0, "path": path, "lastCommit": last_commit(commit)}


def last_commit(commit: Commit) -> dict[str, Any]:
    """Return the last commit of a file; here, that is always the commit of its tree."""
    return {"id": commit.id, "title": commit.title, "date": with_milliseconds(commit.time)}


def folders(paths: Iterable[str], below: str) -> list[str]:
    """Return the folders that contain some paths, below a folder, sorted."""
    parents = set()
    for path in paths:
        parent = posixpath.dirname(path)
        while parent and parent != below:
            parents.add(parent)
            parent = posixpath.dirname(parent)
    return sorted(parents)


def commit_entry(commit: Commit) -> dict[str, Any]:
    """Return a commit of a history."""
    authors = [{"user": commit.author}] if commit.author else []
    return {
        "id": commit.id,
        "title": commit.title,
        "message": commit.description,
        "authors": authors,
        "date": with_milliseconds(commit.time),
    }


def ref_entry(kind: str, name: str, commit: str) -> dict[str, str]:
    """Return a branch (`kind` heads) or a tag (`kind` tags)."""
    return {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit}

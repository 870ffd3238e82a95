"""Repositories, commits and files as the JSON that clients of the Hugging Face Hub parse (`hf_api.py` of huggingface_hub)."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence
from typing import Any

from adapterhub.hub.commits import Commit, View
from adapterhub.hub.git import GitFile
from adapterhub.index.queries import Row
from adapterhub.manifest.card import Card


def moment(time: str) -> str:
    """A time of ours with the milliseconds that old clients require."""
    return f"{time.removesuffix('Z')}.000Z" if time else "1970-01-01T00:00:00.000Z"


def model(of: View, commit: Commit, files: Sequence[GitFile], card: Card | None, *, blobs: bool = False) -> dict[str, Any]:
    """A repository at a commit (`ModelInfo`)."""
    row = commit.row
    found = summary(of, row, commit.id, card)
    found["siblings"] = siblings(files, blobs=blobs)
    found["usedStorage"] = sum(file.size for file in files)
    found["adapterhub"] = {"digest": row.digest, "number": row.number} if row else {}
    if row and row.parameters and row.dtype and row.format != "gguf":
        found["safetensors"] = {"parameters": {row.dtype: row.parameters}, "total": row.parameters}
    if row and row.base:
        found["baseModels"] = {"relation": "adapter", "models": [{"_id": row.base, "id": row.base}]}
    return found


def summary(of: View, row: Row | None, sha: str, card: Card | None = None) -> dict[str, Any]:
    """A repository as lists have it."""
    repository, name = of.repository, of.name
    changed = row.time if row else repository.created if repository else ""
    return {
        "_id": sha[:24],
        "id": name,
        "modelId": name,
        "author": name.partition("/")[0],
        "sha": sha,
        "private": bool(repository and repository.private),
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "createdAt": moment((repository.created if repository else "") or changed),
        "lastModified": moment(changed),
        "library_name": "peft",
        "pipeline_tag": next(iter(card.values("pipeline_tag")), None) if card else None,
        "tags": tags(row, card),
        "cardData": card_data(card, row),
    }


def tags(row: Row | None, card: Card | None) -> list[str]:
    """What repositories are filtered by."""
    found = ["peft"]
    if row:
        found += [row.format if row.format == "gguf" else "safetensors", row.method or ""]
        found += [f"base_model:{row.base}", f"base_model:adapter:{row.base}"] if row.base else []
        found += [f"license:{row.license}"] if row.license else []
    if card:
        found += [*card.values("tags"), *card.values("language")]
    return list(dict.fromkeys(tag for tag in found if tag))


def card_data(card: Card | None, row: Row | None) -> dict[str, Any]:
    """The front matter of the model card, with what the adapter itself says where the card is silent."""
    found: dict[str, Any] = {}
    for key, values in (card.fields if card else {}).items():
        found[key] = values[0] if len(values) == 1 else list(values)
    for key in ("tags", "language"):
        if isinstance(found.get(key), str):
            found[key] = [found[key]]
    if row:
        for key, value in {"base_model": row.base, "license": row.license, "library_name": "peft"}.items():
            if value:
                found.setdefault(key, value)
    return found


def siblings(files: Sequence[GitFile], *, blobs: bool = False) -> list[dict[str, Any]]:
    """The files of a repository as its summary has them; `blobs` for their sizes and names."""
    return [_sibling(file, blobs=blobs) for file in files]


def _sibling(file: GitFile, *, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": file.path}
    found: dict[str, Any] = {"rfilename": file.path, "size": file.size, "blobId": file.oid}
    if file.lfs:
        found["lfs"] = {"sha256": file.lfs, "size": file.size, "pointerSize": file.pointer}
    return found


def entry(file: GitFile, commit: Commit | None = None) -> dict[str, Any]:
    """A file of a tree; with its commit for `expand`."""
    found: dict[str, Any] = {"type": "file", "oid": file.oid, "size": file.size, "path": file.path}
    if file.lfs:
        found["lfs"] = {"oid": file.lfs, "size": file.size, "pointerSize": file.pointer}
    if commit:
        found["lastCommit"] = last_commit(commit)
    return found


def folder(path: str, commit: Commit) -> dict[str, Any]:
    """A folder of a tree."""
    return {"type": "directory", "oid": commit.id, "size": 0, "path": path, "lastCommit": last_commit(commit)}


def last_commit(commit: Commit) -> dict[str, Any]:
    """The commit of a file; every file has that of its tree."""
    return {"id": commit.id, "title": commit.title, "date": moment(commit.time)}


def folders(paths: Iterable[str], below: str) -> list[str]:
    """The folders that paths below a folder are in, sorted."""
    found = set()
    for path in paths:
        parent = posixpath.dirname(path)
        while parent and parent != below:
            found.add(parent)
            parent = posixpath.dirname(parent)
    return sorted(found)


def commit_entry(commit: Commit) -> dict[str, Any]:
    """A commit of a history."""
    authors = [{"user": commit.author}] if commit.author else []
    return {
        "id": commit.id,
        "title": commit.title,
        "message": commit.description,
        "authors": authors,
        "date": moment(commit.time),
    }


def ref(kind: str, name: str, commit: str) -> dict[str, str]:
    """A branch (`heads`) or a tag (`tags`)."""
    return {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit}

"""The name and the commit of a model, from its place in the cache of huggingface_hub.

A folder `models--ORG--NAME/snapshots/COMMIT` of that cache has the files of one commit, as links to blobs next to it
(huggingface_hub, "Understand caching"). A base read from there is known by name, like one read from the Hub itself.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .base_spec import BaseSpec

_MODELS, _SNAPSHOTS, _COMMIT_LENGTH = "models--", "snapshots", 40  # hexadecimal digits


def folder_name(repo: str) -> str:
    """Return the name of a model's folder in the cache."""
    return _MODELS + repo.replace("/", "--")


def snapshot_path(repo: str, commit: str) -> Path:
    """Return the folder of a commit, relative to the cache."""
    return Path(folder_name(repo), _SNAPSHOTS, commit)


def is_commit(text: str) -> bool:
    """Return whether a text is the full name of a commit."""
    return len(text) == _COMMIT_LENGTH and not text.strip("0123456789abcdef")


def snapshot_of(path: Path) -> tuple[str | None, str | None]:
    """Return the name and the commit of the snapshot that a local path is or is in; None for any other path."""
    parts = path.absolute().parts
    # The cache may be anywhere in the path.
    for model, snapshots, commit in zip(parts, parts[1:], parts[2:], strict=False):
        if model.startswith(_MODELS) and snapshots == _SNAPSHOTS and is_commit(commit):
            return model.removeprefix(_MODELS).replace("--", "/"), commit
    return None, None


def with_snapshot_name(spec: BaseSpec, folder: Path | None) -> BaseSpec:
    """Add the name and the commit of the snapshot that a local folder is or is in; do nothing for any other folder."""
    repo, commit = snapshot_of(folder) if folder is not None else (None, None)
    return with_repo(spec, repo, commit) if repo and commit else spec


def with_repo(spec: BaseSpec, repo: str, commit: str) -> BaseSpec:
    """Add a name and a commit, unless a GGUF names the model it was made from, whose commit is unknown."""
    if spec.kind == "gguf" and spec.repo and spec.repo != repo:
        return spec
    return replace(spec, repo=repo, revision=commit)

"""Base models in the cache of huggingface_hub, found by name without a network.

The layout is huggingface_hub's ("Understand caching"): `refs/REVISION` has the commit, `snapshots/COMMIT` links to blobs. The
cache belongs to the user, so these links are followed.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from adapterhub_converters.bases import hub_layout
from adapterhub_converters.containers.open_file import open_regular
from adapterhub_converters.errors import RefusedError, UsageError

from .hub_address import SCHEME, HubPath


def place_of(text: str) -> HubPath | None:
    """Return the model that `org/name[@revision][/file]` may mean; None for any other text."""
    if text.startswith((".", "/", "~")) or ":" in text or "\\" in text:
        return None
    try:
        return HubPath.parse(SCHEME + text)
    except UsageError:
        return None


def find(hub_path: HubPath, cache: Path) -> Path | None:
    """Return the folder or file of a model in the cache; None if it is not there."""
    commit = hub_path.revision if hub_layout.is_commit(hub_path.revision) else _commit(hub_path, cache)
    path = cache / hub_layout.snapshot_path(hub_path.repo, commit) / hub_path.path if commit else None
    return path if path is not None and path.exists() else None


def _commit(hub_path: HubPath, cache: Path) -> str | None:
    """Return the commit that a branch or a tag had when it was last downloaded."""
    # The revision becomes part of a path and must not lead out of the cache.
    if any(part in ("", ".", "..") for part in hub_path.revision.split("/")):
        return None
    with contextlib.suppress(OSError, UnicodeDecodeError, RefusedError):
        with open_regular(cache / hub_layout.folder_name(hub_path.repo) / "refs" / hub_path.revision) as ref_file:
            text = ref_file.read(100).decode().strip()
        return text if hub_layout.is_commit(text) else None
    return None

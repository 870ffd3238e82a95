"""Base models as huggingface_hub's cache and as a hub have them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tests.support.hub_server import File, Hub, Repo, is_large

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache: Path, repo: str, folder: Path, commit: str = COMMIT) -> Path:
    """A model in the cache as huggingface_hub lays it out: a snapshot of links to blobs; the snapshot."""
    root = cache / ("models--" + repo.replace("/", "--"))
    snapshot = root / "snapshots" / commit
    for part in (snapshot, root / "blobs", root / "refs"):
        part.mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(commit)
    for file in folder.iterdir():
        blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def publish(hub: Hub, repo: str, files: dict[str, bytes]) -> str:
    """Put a model on a hub; the commit."""
    stored_repo = hub.repos.setdefault(repo, Repo())
    content = {name: File(data, large=is_large(name, data[:100], len(data))) for name, data in files.items()}
    hub.large.update({file.sha256: file.data for file in content.values() if file.large})
    stored_repo.branches["main"] = stored_repo.add(content, "a model", None)
    return stored_repo.branches["main"].oid

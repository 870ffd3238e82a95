"""Entries that commands add to a lock file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.operations import lock

from . import environment, output
from .options import Settings
from .registry_choice import workspace

if TYPE_CHECKING:
    from adapterhub.manifest.oci_manifest import Manifest
    from adapterhub.registry.registry import Version


def record_local_version(settings: Settings, ref: str, version: Version) -> None:
    """Record a version of the local registry, which the policy allows, in the lock file."""
    from adapterhub.ref import Ref

    digest_ref = str(Ref(version.name, digest=version.digest))
    record(ref, None, lock.local_manifest(digest_ref, workspace(settings), is_allowed=True))


def record(ref: str, address: str | None, manifest: Manifest) -> None:
    """Record a version in the lock file; `address` is None for one of the local registry."""
    from adapterhub.project import lockfile

    path = environment.lock_file()
    if address is not None:
        environment.remember_host(address)
    is_new = lockfile.record(path, {(locked := lock.entry(ref, address, manifest)).name: locked})
    output.say(output.one_line(f"{'locked' if is_new else 'already locked'}: {locked.ref} in {display_path(path)}"))


def display_path(path: Path) -> str:
    """Return the path of a lock file as shown to the user: its name alone in the working folder."""
    return path.name if path.parent == Path.cwd() else str(path)

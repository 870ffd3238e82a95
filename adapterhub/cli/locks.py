"""Entries of a lock file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from . import environment, output
from .options import Settings

if TYPE_CHECKING:
    from adapterhub.manifest.oci_manifest import Manifest
    from adapterhub.project.lockfile import Locked
    from adapterhub.registry.registry import Version


def keep_version(settings: Settings, ref: str, version: Version) -> None:
    """Record a version of the local registry in the lock file."""
    from adapterhub.ref import Ref

    keep(ref, None, here(settings, str(Ref(version.name, digest=version.digest))))


def keep(ref: str, address: str | None, made: Manifest) -> None:
    """Record a version in the lock file; `address` is None for one of the local registry."""
    from adapterhub.project import lockfile

    path = environment.lock_file()
    if address is not None:
        environment.used(address)
    new = lockfile.record(path, {(locked := entry(ref, address, made)).name: locked})
    output.say(output.one_line(f"{'locked' if new else 'already locked'}: {locked.ref} in {shown(path)}"))


def entry(ref: str, address: str | None, made: Manifest) -> Locked:
    """The entry of a version; `address` is None for one of the local registry."""
    from adapterhub.project import lockfile
    from adapterhub.remotes import location

    name = ref.partition("@")[0].partition(":")[0]
    if "://" in ref:
        place = location.parse(ref)
        named = (place.tag or "").partition(":")[0]  # in an image layout, a whole ref is the tag
        name = named if "/" in named else lockfile.name_of(place.repository)
    return lockfile.entry(name, ref, address or lockfile.HERE, made)


def here(settings: Settings, text: str) -> Manifest:
    """The manifest of a version of the local registry."""
    from adapterhub.ref import Ref
    from adapterhub.remotes.local import Local

    ref = Ref.parse(text)
    with environment.open_registry(settings) as registry:
        version = registry.resolve(ref)
        output.deprecated(str(version.ref), version.deprecated)
        return Local(registry, ref.name).manifest(version.digest)


def shown(path: Path) -> str:
    """The path of a lock file as shown."""
    return path.name if path.parent == Path.cwd() else str(path)

"""Versions and the lock file of a project: their entries, resolved now and again, and pulled by digest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_converters.errors import IntegrityError

from . import sources
from .sharing import pulling
from .sharing.policy import check_policy
from .sharing.signatures import Named
from .workspace import Workspace

if TYPE_CHECKING:
    from adapterhub.manifest.oci_manifest import Manifest
    from adapterhub.project.lockfile import Locked
    from adapterhub.remotes.location import Place


def locked(ref: str, address: str | None, workspace: Workspace) -> Locked:
    """The entry of the version that a ref points to now; `address` is None for one of the registry."""
    return entry(ref, address, here(ref, workspace) if address is None else _at(address, workspace))


def again(old: Locked, workspace: Workspace, file: Path) -> Locked:
    """The same entry of the lock file `file`, resolved again."""
    from adapterhub.project import lockfile

    made = here(old.ref, workspace) if old.source == lockfile.HERE else _at(workspace.admitted(old.source, file), workspace)
    return lockfile.entry(old.name, old.ref, old.source, made)


def entry(ref: str, address: str | None, made: Manifest) -> Locked:
    """The entry of a version with this manifest; `address` is None for one of the registry."""
    from adapterhub.project import lockfile
    from adapterhub.remotes import location

    name = ref.partition("@")[0].partition(":")[0]
    if "://" in ref:
        place = location.parse(ref)
        named = (place.tag or "").partition(":")[0]  # in an image layout, a whole ref is the tag
        name = named if "/" in named else lockfile.name_of(place.repository)
    return lockfile.entry(name, ref, address or lockfile.HERE, made)


def here(text: str, workspace: Workspace) -> Manifest:
    """The manifest of a version of the registry."""
    from adapterhub.ref import Ref
    from adapterhub.remotes.local import Local

    ref = Ref.parse(text)
    with workspace.opened() as registry:
        version = registry.resolve(ref)
        workspace.deprecated(version.ref, version.deprecated)
        return Local(registry, ref.name).manifest(version.digest)


def _at(address: str, workspace: Workspace) -> Manifest:
    from adapterhub.remotes import location

    place = location.parse(address)
    with workspace.connect(place) as there:
        return there.manifest(place.reference)


def pull(one: Locked, target: Path, workspace: Workspace, file: Path, *, replace: bool = False) -> bool:
    """Pull a version of the lock file `file` into a folder, as `pulling.pull`; False if the folder was that version already."""
    from adapterhub.manifest import present
    from adapterhub.project import lockfile
    from adapterhub.remotes.location import parse

    if one.source == lockfile.HERE:
        return pulling.pull(f"{one.name}@{one.digest}", target, workspace, replace=replace).new
    place = parse(one.source)
    workspace.check_name(_asked_for(one, place))
    there = present.look(target)
    if there is not None and there.digest == one.digest and not there.others:
        return False
    workspace.admitted(one.source, file)
    with workspace.connect(place) as remote:
        check_policy(remote, one.digest, Named.at(place, one.ref, _asked_for(one, place)), workspace)
        made, new = sources.downloaded(remote, one.digest, target, place.host, workspace, replace=replace)
    if made.digest != one.digest:
        what = f"digest mismatch: received {made.digest}, locked {one.digest}"
        raise IntegrityError(one.source, what, "Ask the owner of the registry")
    return new


def _asked_for(one: Locked, place: Place) -> str:
    """The name that the policy allows or not, as in a pull of the same ref without a lock: that of a ref on a remote, else the
    whole address.

    A lock file can pair any name and ref with any source. Only the source tells which adapter is pulled, so a ref counts only
    if the source has its name.
    """
    name = one.ref.partition("@")[0].partition(":")[0]
    # In an image layout, a whole ref is the tag.
    is_there = place.repository.endswith(f"/{name}") or (place.tag or "").startswith(f"{name}:")
    return name if is_there and "://" not in one.ref else place.repository

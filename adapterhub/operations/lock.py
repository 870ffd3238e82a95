"""Entries of a project's lock file: from the version that a ref names now, resolved again, and pulled by digest.

The file itself is in `adapterhub.project.lockfile`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_converters.errors import IntegrityError

from . import pull as pull_operation
from . import sources
from .policy_checks import check_policy, check_version
from .signature_checks import VersionNames
from .workspace import Workspace

if TYPE_CHECKING:
    from adapterhub.manifest.oci_manifest import Manifest
    from adapterhub.project.lockfile import LockedAdapter
    from adapterhub.remotes.remote_address import RemoteAddress


def entry_of_ref(ref: str, address: str | None, workspace: Workspace) -> LockedAdapter:
    """Return the entry of the version that a ref points to now, if the policy allows it.

    `address` is None for a ref of the registry.
    """
    manifest = local_manifest(ref, workspace) if address is None else _remote_manifest(ref, address, workspace)
    return entry(ref, address, manifest)


def resolve_again(old: LockedAdapter, workspace: Workspace, file: Path) -> LockedAdapter:
    """Resolve an entry of the lock file `file` again, and return the new entry."""
    from adapterhub.project import lockfile

    manifest = (
        local_manifest(old.ref, workspace)
        if old.source == lockfile.LOCAL_REGISTRY
        else _remote_manifest(old.ref, workspace.admitted_address(old.source, file), workspace)
    )
    return lockfile.entry(old.name, old.ref, old.source, manifest)


def entry(ref: str, address: str | None, manifest: Manifest) -> LockedAdapter:
    """Return the entry of a version with this manifest; `address` is None for a version of the registry."""
    from adapterhub.project import lockfile
    from adapterhub.remotes import remote_address

    name = ref.partition("@")[0].partition(":")[0]
    if "://" in ref:
        address_ = remote_address.parse(ref)
        tag_name = (address_.tag or "").partition(":")[0]  # in an image layout, the tag is a whole ref
        name = tag_name if "/" in tag_name else lockfile.name_of(address_.repository)
    return lockfile.entry(name, ref, address or lockfile.LOCAL_REGISTRY, manifest)


def local_manifest(text: str, workspace: Workspace, *, is_allowed: bool = False) -> Manifest:
    """Return the manifest of a version of the registry, if the policy allows it; not asked again if `is_allowed`."""
    from adapterhub.ref import Ref
    from adapterhub.remotes.local_name import LocalName

    ref = Ref.parse(text)
    if not is_allowed:
        workspace.check_name(ref.name)
    with workspace.open_registry() as registry:
        version = registry.resolve(ref)
        if not is_allowed:
            check_version(registry, version, VersionNames.of_version(version, text), workspace)
        workspace.warn_if_deprecated(version.ref, version.deprecated)
        return LocalName(registry, ref.name).manifest(version.digest)


def _remote_manifest(ref: str, address: str, workspace: Workspace) -> Manifest:
    """Return the manifest of the version at the address of a ref, if the policy allows it."""
    from adapterhub.remotes import remote_address

    parsed = remote_address.parse(address)
    name = _policy_name(ref, parsed)
    workspace.check_name(name)
    with workspace.connect(parsed) as remote:
        manifest = remote.manifest(parsed.reference)
        # By its digest: a tag may move in the meantime.
        check_policy(remote, manifest.digest, VersionNames.of_address(parsed, ref, name), workspace)
        return manifest


def pull(pin: LockedAdapter, target: Path, workspace: Workspace, file: Path, *, replace: bool = False) -> bool:
    """Pull a version of the lock file `file` into a folder, as `pull` does.

    Returns:
        False if the folder was that version already.
    """
    from adapterhub.manifest import existing_folder
    from adapterhub.project import lockfile
    from adapterhub.remotes.remote_address import parse

    if pin.source == lockfile.LOCAL_REGISTRY:
        return pull_operation.pull(f"{pin.name}@{pin.digest}", target, replace=replace, workspace=workspace).new
    parsed = parse(pin.source)
    name = _policy_name(pin.ref, parsed)
    workspace.check_name(name)
    current = existing_folder.inspect_folder(target)
    if current is not None and current.digest == pin.digest and not current.other_paths:
        return False
    # The owner of the address is checked even though it is in the lock file: the file comes with a clone of the project.
    workspace.admitted_address(pin.source, file)
    with workspace.connect(parsed) as remote:
        check_policy(remote, pin.digest, VersionNames.of_address(parsed, pin.ref, name), workspace)
        manifest, new = sources.download_version(remote, pin.digest, target, parsed.host, workspace, replace=replace)
    if manifest.digest != pin.digest:
        problem = f"digest mismatch: received {manifest.digest}, locked {pin.digest}"
        raise IntegrityError(pin.source, problem, "Ask the owner of the registry")
    return new


def _policy_name(ref: str, place: RemoteAddress) -> str:
    """Return the name that the policy decides on, as in a pull of the same ref without a lock.

    It is the name of a ref on a remote, else the whole address. A lock file can pair any name and ref with any source. Only the
    source tells which adapter is pulled, so a ref counts only if the source has its name.
    """
    name = ref.partition("@")[0].partition(":")[0]
    # In an image layout, the tag is a whole ref.
    is_at_source = place.repository.endswith(f"/{name}") or (place.tag or "").startswith(f"{name}:")
    return name if is_at_source and "://" not in ref else place.repository

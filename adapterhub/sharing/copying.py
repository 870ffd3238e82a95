"""Copy an adapter between the registry, addresses and folders. A version that is copied keeps its digest."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from adapterhub import sources
from adapterhub.registry.signatures import keep
from adapterhub.workspace import StrPath, Workspace
from adapterhub_converters.errors import UsageError

from . import signatures
from .policy import check_policy
from .pulling import Pulled, pull
from .pushing import packaged, push
from .sent import Sent
from .signatures import Named

if TYPE_CHECKING:
    from adapterhub.ref import Ref
    from adapterhub.registry.registry import Registry, Version
    from adapterhub.remotes.protocol import Source


def copy(source: StrPath, target: StrPath, workspace: Workspace, *, with_signatures: bool = False) -> Version | Sent | Pulled:
    """Copy an adapter under the same digest: to a ref of the registry, an address, or a folder.

    A target that could be a ref is one; write a folder as `./NAME`, or give a `Path`. From an address to the registry, the
    signatures come along if the policy requires any, or on request; from the registry to an address they always do.
    """
    from adapterhub.ref import Ref

    text = os.fspath(target)
    if sources.is_address(target):
        return push(source, text, workspace)
    try:
        ref = None if not isinstance(target, str) or text.startswith((".", os.sep)) else Ref.parse(text)
    except UsageError:
        ref = None
    if ref is not None:
        workspace.check_name(ref.name)
        with workspace.opened(make=True) as registry:
            return _into_registry(registry, source, ref, workspace, with_signatures=with_signatures)
    if not sources.is_address(source) and sources.ref_of(source, workspace) is None:
        raise UsageError(text, "both are folders", "Copy a folder with the tools of your system")
    return pull(os.fspath(source), target, workspace)


def _into_registry(registry: Registry, source: StrPath, ref: Ref, workspace: Workspace, *, with_signatures: bool) -> Version:
    """A version of `ref` with the manifest of the source, or a new one where that has no adapter.json."""
    from adapterhub.remotes.local import Local
    from adapterhub.remotes.location import parse

    if registry.policy is not None:
        registry.policy.check_name(ref.name)
    workspace = workspace.within(registry)
    if sources.is_address(source):
        place = parse(os.fspath(source))
        with workspace.connect(place) as remote:
            made = remote.manifest(place.reference)
            if made.adapter_json is not None:
                named = Named.at(place, os.fspath(source), into=ref.name)
                check_policy(remote, made.digest, named, workspace)
                version = _admitted(registry, remote, made.digest, ref, workspace)
                if with_signatures or signatures.wanted(named, workspace):
                    keep(registry.store, made, signatures.stored(remote, made.digest), workspace.rules(), ref.name)
                return version
    elif (found := sources.ref_of(source, workspace)) is not None:
        with registry.reading(found) as version:
            local = Local(registry, version.name)
            check_policy(local, version.digest, Named.of(version, str(version.ref), into=ref.name), workspace)
            return _admitted(registry, local, version.digest, ref, workspace)
    with sources.opened(source, workspace) as one, packaged(one, workspace, name=ref.name) as package:
        return registry.publish(package, ref)


def _admitted(registry: Registry, source: Source, digest: str, ref: Ref, workspace: Workspace) -> Version:
    from adapterhub.remotes import copy as copying
    from adapterhub.remotes.local import Local

    target = Local(registry, ref.name, workspace.rules())
    with target.at_work(), workspace.bar("copying") as show:
        copying.copy(source, digest, target, ref.tag, show, **workspace.transfer())
    return target.version or registry.resolve(ref)

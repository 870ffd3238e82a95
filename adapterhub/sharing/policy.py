"""Comparison of a version with the policy, and of its signatures with keys, before its files are fetched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from adapterhub.workspace import Workspace

from . import signatures
from .signatures import NOTHING, Demand, Named

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.registry.registry import Registry, Version
    from adapterhub.remotes.protocol import Source
    from adapterhub.trust.bundle import Signed


def check_policy(
    source: Source,
    reference: str,
    named: Named,
    workspace: Workspace,
    demand: Demand = NOTHING,
) -> Signed | None:
    """Compare a version with the policy, before anything but its adapter.json, or for a license its card, is fetched.

    `demand` and what is returned are those of `signatures.require`.
    """
    policy = workspace.rules()
    if policy and policy.needs_manifest:
        from adapterhub.remotes.copy import declared, read_manifest

        made = source.manifest(reference)
        manifest = read_manifest(source, made, named.where)
        if policy.needs_license and manifest.license is None:
            manifest = declared(source, made, manifest, named.where)
        policy.check_manifest(manifest, named.where, size=made.files_size, metrics=_measured(source, made.digest))
    return signatures.require(source, reference, named, workspace, demand)


def _measured(source: Source, digest: Digest) -> Mapping[str, float]:
    """The measurements of a version, which the logs of a registry have; none elsewhere."""
    from adapterhub.remotes.local import Local
    from adapterhub.remotes.parallel import unwatched

    place = unwatched(source)
    return place.registry.metrics(digest) if isinstance(place, Local) else {}


def check_version(
    registry: Registry,
    version: Version,
    named: Named,
    workspace: Workspace,
    demand: Demand = NOTHING,
) -> Signed | None:
    """Compare a version of the registry with its policy and, beyond its name, the project's; otherwise as `check_policy`."""
    if registry.policy is not None:
        registry.policy.check_name(version.name)
    workspace = workspace.within(registry)
    policy = workspace.rules()
    needs_manifest = policy is not None and policy.needs_manifest
    if not needs_manifest and not signatures.wanted(named, workspace, demand):
        return None
    from adapterhub.remotes.local import Local  # with an HTTP client, which most pulls do without

    local = Local(registry, version.name, policy)
    if needs_manifest:
        local.check(local.manifest(version.digest), named.where, facts_only=True)
    return signatures.require(local, version.digest, named, workspace, demand)


def check_address(source: str, workspace: Workspace) -> None:
    """Compare the version at an address with the policy, as a pull does; nothing of its files is fetched."""
    from adapterhub.remotes.location import parse

    if (policy := workspace.rules()) is None:
        return
    address = parse(source)
    policy.check_name(address.repository)
    with workspace.connect(address) as remote:
        check_policy(remote, address.reference, Named.at(address, source), workspace)

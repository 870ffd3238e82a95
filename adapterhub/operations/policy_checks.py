"""Checks of a version against the policy, and of its signatures against keys, before its files are fetched.

`adapterhub/project/policy.py` has the rules; this module says when they apply.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.project.policy_rules import NO_MEASUREMENTS, Measurements, ReadParent, VersionFacts
from adapterhub_converters.errors import AdapterhubError

from . import signature_checks
from .signature_checks import NO_DEMAND, Demand, VersionNames
from .workspace import Workspace

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.manifest.document import AdapterManifest
    from adapterhub.manifest.oci_manifest import Manifest
    from adapterhub.registry.registry import Registry, Version
    from adapterhub.remotes.protocol import Source
    from adapterhub.trust.bundle import SignedStatement


def check_policy(
    source: Source,
    reference: str,
    names: VersionNames,
    workspace: Workspace,
    demand: Demand = NO_DEMAND,
) -> SignedStatement | None:
    """Check a version against the policy, fetching only its adapter.json, or its card to find a license.

    `demand` and the result are as in `signatures.require`.
    """
    policy = workspace.rules()
    if policy and policy.needs_manifest:
        from adapterhub.remotes.version_copy import read_adapter_manifest, with_card

        oci_manifest = source.manifest(reference)
        manifest = read_adapter_manifest(source, oci_manifest, names.location)
        if policy.needs_license and manifest.license is None:
            manifest = with_card(source, oci_manifest, manifest, names.location)
        policy.check_manifest(manifest, names.location, version_facts(source, oci_manifest, workspace))
    return signature_checks.require(source, reference, names, workspace, demand)


def version_facts(source: Source, manifest: Manifest, workspace: Workspace) -> VersionFacts:
    """Return what the policy asks about a version besides its adapter.json."""
    return VersionFacts(
        manifest.files_size,
        _measurements(source, manifest.digest),
        parent_reader(workspace),
        partial(_first_problem, source, manifest),
    )


def parent_reader(workspace: Workspace) -> ReadParent:
    """Return the function that reads the adapter.json of a version in the registry, which is opened if the policy asks."""

    def read(digest: Digest) -> AdapterManifest | None:
        from adapterhub.registry.version_facts import read_parent

        try:
            with workspace.open_registry() as registry:
                return read_parent(registry.store, digest)
        except AdapterhubError:  # no registry
            return None

    return read


def _first_problem(source: Source, manifest: Manifest) -> str:
    """Return the first problem that a scan of the files of a version finds, which are fetched for it; empty for none."""
    from adapterhub.registry.version_facts import first_problem, first_stored_problem
    from adapterhub.remotes.adapter_folders import download
    from adapterhub.remotes.local_name import LocalName
    from adapterhub.remotes.parallel_transfer import unwrapped

    place = unwrapped(source)
    if isinstance(place, LocalName):
        return first_stored_problem(place.registry.store, manifest)
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        folder = Path(temporary) / "scanned"
        download(source, manifest.digest, folder)
        return first_problem(folder, [layer.path for layer in manifest.layers])


def _measurements(source: Source, digest: Digest) -> Measurements:
    """Return the recorded metrics of a version, which only the logs of a registry have; none elsewhere."""
    from adapterhub.remotes.local_name import LocalName
    from adapterhub.remotes.parallel_transfer import unwrapped

    place = unwrapped(source)
    return place.registry.measurements(digest) if isinstance(place, LocalName) else NO_MEASUREMENTS


def check_version(
    registry: Registry,
    version: Version,
    names: VersionNames,
    workspace: Workspace,
    demand: Demand = NO_DEMAND,
) -> SignedStatement | None:
    """Check a version of the registry against the registry's policy and the project's, otherwise like `check_policy`.

    The registry's policy alone decides about the name of the version.
    """
    if registry.policy is not None:
        registry.policy.check_name(version.name)
    workspace = workspace.within(registry)
    policy = workspace.rules()
    needs_manifest = policy is not None and policy.needs_manifest
    if not needs_manifest and not signature_checks.needs_signature(names, workspace, demand):
        return None
    from adapterhub.remotes.local_name import LocalName  # with an HTTP client, which most pulls do without

    local = LocalName(registry, version.name, policy)
    if needs_manifest:
        local.check_version(local.manifest(version.digest), names.location, facts_only=True)
    return signature_checks.require(local, version.digest, names, workspace, demand)


def check_use(registry: Registry, version: Version, location: str, workspace: Workspace) -> None:
    """Check a version of the registry, and its name, before it is used for anything; errors call it `location`."""
    workspace.check_name(version.name)
    check_version(registry, version, VersionNames.of_version(version, location), workspace)

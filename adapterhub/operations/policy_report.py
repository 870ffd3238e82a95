"""Report on a version under every rule that a way asks of it, without an end at the first refusal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterhub.registry import signature_policy
from adapterhub_converters.errors import UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from . import policy_checks, source_names
from .signature_checks import VersionNames
from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.project.policy_rules import RuleCheck
    from adapterhub.remotes.protocol import Source


@dataclass(frozen=True)
class PolicyReport:
    """A version beside every rule that applies to it.

    Attributes:
        ref: Its ref or its address.
        digest: The digest of its manifest.
        checks: The rules, in the order of the policies.
    """

    ref: str
    digest: Digest
    checks: tuple[RuleCheck, ...]

    @property
    def violations(self) -> list[RuleCheck]:
        """The rules that are not met."""
        return [check for check in self.checks if check.problem]


def report(source: StrPath, workspace: Workspace, *, to: str = "") -> PolicyReport:
    """Return every rule of the policies of the project and of the registry beside a version; nothing is refused.

    Args:
        source: A ref of the registry, or an address.
        workspace: The policy, the registry and the credentials.
        to: The name or the address that the version would be stored at; empty for a use of it.

    Raises:
        UsageError: It is a folder, which is compared with the policy when it is pushed.
    """
    if source_names.is_address(source):
        from adapterhub.remotes.parallel_transfer import PinnedSource
        from adapterhub.remotes.remote_address import parse

        address = parse(str(source))
        with workspace.connect(address) as remote:
            names = VersionNames.of_address(address, into=_stored_name(to))
            return _report(PinnedSource(remote), address.reference, names, workspace, is_sent=source_names.is_address(to))
    ref = source_names.ref_of(source, workspace)
    if ref is None:
        raise UsageError(str(source), "is a folder, and rules are about versions", "A push compares a folder with them")
    from adapterhub.remotes.local_name import LocalName

    with workspace.open_registry() as registry, registry.lease_version(ref) as version:
        local = LocalName(registry, version.name)
        # An adapter.json that contradicts the weights is no basis for any rule.
        local.check_version(local.manifest(version.digest), str(version.ref), facts_only=True)
        names = VersionNames.of_version(version, str(version.ref), into=_stored_name(to))
        is_sent = source_names.is_address(to)
        return _report(local, version.digest, names, workspace.within(registry), is_sent=is_sent)


def _stored_name(to: str) -> str:
    """Return the name that rules are asked about: that of a ref, or a whole address without the version."""
    from adapterhub.ref import Ref
    from adapterhub.remotes.remote_address import parse

    if not to:
        return ""
    return parse(to).repository if source_names.is_address(to) else Ref.parse(to).name


def _report(
    source: Source, reference: str, names: VersionNames, workspace: Workspace, *, is_sent: bool = False
) -> PolicyReport:
    """Return the report; `is_sent` for a push to an address, where those who read it ask for its signatures."""
    from adapterhub.remotes.version_copy import read_adapter_manifest, with_card

    policy, manifest = workspace.rules(), source.manifest(reference)
    checks: list[RuleCheck] = []
    if policy is not None:
        checks += policy.name_checks(names.name)
        if policy.needs_manifest:
            adapter_manifest = read_adapter_manifest(source, manifest, names.location)
            if policy.needs_license and adapter_manifest.license is None:
                adapter_manifest = with_card(source, manifest, adapter_manifest, names.location)
            checks += policy.manifest_checks(adapter_manifest, policy_checks.version_facts(source, manifest, workspace))
        if not is_sent:
            from adapterhub.remotes import attached_signatures

            signatures = attached_signatures.stored(source, manifest.digest)
            checks += signature_policy.rule_checks(
                policy, manifest, signatures, name=names.name, signed_as=names.signed_as, location=names.location
            )
    return PolicyReport(names.location, manifest.digest, tuple(checks))

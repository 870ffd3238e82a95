"""Signatures of pushed versions: the ones that a policy requires for a name, and the ones stored with a version.

An attestation is a signature of a statement about a version; it is stored, carried and required as a signature of files is. The
cryptography is in `adapterhub.trust`, the files in `store.signature_files`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.manifest.package_files import SIGNATURE
from adapterhub.project.policy import Policy, refusal
from adapterhub.project.policy import SigningRule as Rule
from adapterhub.project.policy_rules import RuleCheck
from adapterhub.store.signature_files import MAX_SIGNATURES, MAX_UNREQUESTED
from adapterhub.trust import attestation, bundle, statement
from adapterhub_converters.containers.confined_files import ConfinedFiles
from adapterhub_converters.errors import AdapterhubError, IntegrityError, LocalIOError
from adapterhub_converters.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.manifest.oci_manifest import Manifest
    from adapterhub.store.store import Store
    from adapterhub.trust.attestation import Attestation
    from adapterhub.trust.bundle import SignedStatement

LIMIT = bundle.MAX_BUNDLE + 1
"""Bytes to read of a signature: one more than a valid one has."""


def signed_files(manifest: Manifest) -> dict[str, Digest]:
    """Return the files of a version as they are signed: path to digest."""
    return {layer.path: layer.digest for layer in manifest.layers}


def in_folder(folder: Path) -> tuple[bytes, ...]:
    """Return the signature in a folder, unverified; empty if there is none."""
    path = folder / SIGNATURE
    try:
        return (ConfinedFiles(folder).read(path, LIMIT),)
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except OSError as error:
        raise LocalIOError(str(path), error.strerror or str(error)) from error


def check(
    policy: Policy | None,
    manifest: Manifest,
    read_signatures: Callable[[], Sequence[bytes]],
    *,
    name: str,
    location: str,
    signed_as: str = "",
) -> SignedStatement | None:
    """Verify that a version is signed and attested as the policy requires for its name.

    Args:
        policy: The policy; None without one.
        manifest: The manifest of the version.
        read_signatures: Returns its signatures and attestations; called only if one is required.
        name: Its name, to which the rules of the policy apply.
        location: Its name in errors.
        signed_as: The name it was signed as, if that is not `name`.

    Returns:
        A required signature of its files; None if the policy requires none.

    Raises:
        RefusedError: It is not signed or attested as required (code `against-policy`).
    """
    # Reading signatures may take requests to a remote, so they are read only if a rule needs them.
    rules = policy.signing_rules(name) if policy else []
    if not rules:
        return None
    signed, bundles = None, read_signatures()
    for rule in rules:
        try:
            signed = _check_rule(policy, rule, manifest, bundles, name=signed_as or name, location=location) or signed
        except IntegrityError as error:
            raise refusal(location, rule.file, [f"{rule.rule}: {error.what}"], error.hint) from error
    return signed


def rule_checks(
    policy: Policy, manifest: Manifest, bundles: Sequence[bytes], *, name: str, signed_as: str, location: str
) -> list[RuleCheck]:
    """Return every rule about signers that applies to a name, beside the signatures of a version."""
    checks = []
    for rule in policy.signing_rules(name):
        problem, value = "", "attested" if rule.attestation else "signed"
        try:
            signed = _check_rule(policy, rule, manifest, bundles, name=signed_as, location=location)
            value = f"signed by {signed.signer.title}" if signed else value
        except IntegrityError as error:
            problem, value = error.what, f"not {value}"
        checks.append(RuleCheck(rule.file, rule.rule, value, problem))
    return checks


def _check_rule(
    policy: Policy | None, rule: Rule, manifest: Manifest, bundles: Sequence[bytes], *, name: str, location: str
) -> SignedStatement | None:
    """Return the signature that a rule requires, or None for an attestation; IntegrityError if it is missing."""
    from adapterhub.trust.keys import read_trusted  # needs cryptography

    if rule.least > 1:
        return _joint_signature(rule, manifest, bundles, name=name, location=location)
    keys = read_trusted(rule.keys)
    if not rule.attestation:
        return bundle.find_accepted(bundles, keys, signed_files(manifest), name, location, digest=manifest.digest)
    attestation.find_accepted(
        bundles, rule.attestation, keys, manifest.digest, location, check=partial(_check_claim, policy, rule, location)
    )
    return None


def _joint_signature(rule: Rule, manifest: Manifest, bundles: Sequence[bytes], *, name: str, location: str) -> SignedStatement:
    """Return a signature of a version that enough people have signed; IntegrityError if too few have."""
    from adapterhub.trust.keys import read_trusted

    used: set[str] = set()
    signatures, reasons = [], []
    for person in rule.keys:
        # A key counts for the first person who has it: nobody signs for two.
        keys = [key for key in read_trusted([person]) if key.id not in used]
        used.update(key.id for key in keys)
        try:
            signed = bundle.find_accepted(bundles, keys, signed_files(manifest), name, location, digest=manifest.digest)
            signatures.append(signed)
        except IntegrityError as error:
            reasons.append(error)
    if len(signatures) < rule.least:
        problem = f"is signed by {len(signatures)} of the {rule.least} people who must sign it"
        raise IntegrityError(location, problem, "Have it signed by more of them", code="signature") from reasons[0]
    return signatures[0]


def _check_claim(policy: Policy | None, rule: Rule, location: str, claim: Attestation) -> None:
    """Raise IntegrityError if an attestation is about a base or a result that the policy does not allow."""
    if claim.kind == attestation.FITS:
        base = attestation.base_fingerprint(claim)
        if policy and not all(base in bases for bases in policy.base_digests()):
            raise IntegrityError(location, f"the attestation is about the base {base[:19]}…, which the policy does not allow")
    if claim.kind == attestation.TRAINING and policy and (problem := policy.base_violation(*attestation.trained_base(claim))):
        raise IntegrityError(location, f"the attestation is about the base {problem}")
    if claim.kind == attestation.TRAINING and policy and (problem := policy.builder_violation(attestation.builder(claim))):
        raise IntegrityError(location, f"the attestation {problem}")
    if rule.evaluation is not None:
        metric = rule.evaluation.bounds.metric
        if problem := rule.evaluation.violation(*attestation.measured(claim, metric)):
            raise IntegrityError(location, f"the attested {metric} {problem}")


@dataclass(frozen=True)
class SignatureSummary:
    """A signature or an attestation, as it is shown to people.

    Attributes:
        what: `files`, the kind of an attestation, or the type of its predicate.
        signer: The signer that it claims.
        is_about: Whether it is about this version.
        verified: Whether it is valid, and its signer is one that the policy requires for the name of the version.
    """

    what: str
    signer: str
    is_about: bool
    verified: bool


def summarize(policy: Policy | None, manifest: Manifest, signatures: Iterable[bytes], name: str) -> list[SignatureSummary]:
    """Describe the signatures of a version, skipping those that cannot be parsed."""
    summaries = []
    for raw in signatures:
        with suppress(AdapterhubError):
            try:
                signer = bundle.claimed_signer(raw, name)
            except ImportError:  # no cryptography
                signer = "an identity"
            predicate_type = bundle.predicate_type(raw)
            statement_kind = (
                "files" if predicate_type == statement.PREDICATE_TYPE else attestation.kind_of(predicate_type) or predicate_type
            )
            summaries.append(
                SignatureSummary(statement_kind, signer, is_about(raw, manifest), _is_required(policy, manifest, raw, name))
            )
    return summaries


def _is_required(policy: Policy | None, manifest: Manifest, raw: bytes, name: str) -> bool:
    """Return True if a bundle alone meets one of the policy's rules about signers."""
    for rule in policy.signing_rules(name) if policy else ():
        with suppress(AdapterhubError):
            # One of several people who must sign it is required as well.
            _check_rule(policy, dataclasses.replace(rule, least=1), manifest, [raw], name=name, location=name)
            return True
    return False


def all_signatures(store: Store, manifest: Manifest, incoming: Iterable[bytes]) -> list[bytes]:
    """Return the signatures of a version: those that came with it and those that are stored; none is verified."""
    return [*incoming, *store.signatures.read(manifest.digest, LIMIT)]


def store_signatures(
    store: Store, manifest: Manifest, signatures: Iterable[bytes], policy: Policy | None = None, name: str = ""
) -> None:
    """Store the signatures and attestations that came with a version and are about it, unverified: that is up to readers.

    At most MAX_UNREQUESTED of them are stored, apart from those that a policy requires for the version's name.
    """
    for raw in signatures:
        with suppress(AdapterhubError):  # too many of them, for instance: that must not fail the push
            if is_about(raw, manifest):
                store.signatures.add(
                    manifest.digest, raw, MAX_SIGNATURES if _is_required(policy, manifest, raw, name) else MAX_UNREQUESTED
                )


def kept_unasked(signatures: Iterable[bytes], manifest: Manifest, policy: Policy | None, name: str) -> list[bytes]:
    """Return the signatures about a version that are kept with it unasked: those that a policy requires, and some others."""
    about = [raw for raw in signatures if is_about(raw, manifest)]
    required = [raw for raw in about if _is_required(policy, manifest, raw, name)]
    return [*required, *[raw for raw in about if raw not in required][:MAX_UNREQUESTED]]


def is_about(raw: bytes, manifest: Manifest) -> bool:
    """Return True if a bundle claims to sign the files of a version and no others, or to attest something about it."""
    with suppress(AdapterhubError):
        claimed = bundle.claimed_payload(raw, "")
        predicate_type = bundle.predicate_type(raw)
        if predicate_type == statement.PREDICATE_TYPE:
            return statement.parse(claimed, "").files == signed_files(manifest)
        if predicate_type == bundle.COSIGN_TYPE:
            return bundle.cosign_subject(claimed, "") == manifest.digest
        return attestation.parse(claimed, "").digest == manifest.digest
    return False

"""Signing and verification of adapters by path, ref or address, as the commands `sign` and `verify` do.

The formats and the trust are in `adapterhub.trust`, attestations in `attest`, checkpoints of logs in `audit`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_converters.errors import IntegrityError, ParameterError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from . import attest, signature_checks, source_names, sources
from .workspace import Progress, StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.identity import Identity
    from adapterhub.maintenance.findings import Finding, Findings
    from adapterhub.trust.attestation import VerifiedAttestation
    from adapterhub.trust.keys import Signer, TrustedSigner

    from .attest_predicates import Inputs
    from .signature_checks import Signable


@dataclass(frozen=True, repr=False)
class Signature:
    """A signature of an adapter, made or verified.

    Attributes:
        ref: The ref, the address or the folder of the adapter.
        name: The name it is signed as.
        digest: The digest of the version's manifest; None for a folder.
        files: Paths of the files that are signed, sorted.
        signer: The key or the identity; `title` describes it, and the `id` of a key is the sha256 of its public PEM.
    """

    ref: str
    name: str
    digest: Digest | None
    files: tuple[str, ...]
    signer: TrustedSigner

    def __repr__(self) -> str:
        return f"<Signature {self.ref}: {len(self.files)} files, as {self.name or 'any name'} by {self.signer.title}>"


@dataclass(frozen=True, repr=False)
class Verification:
    """The result of a verification.

    Attributes:
        ref: The verified adapter, as the caller named it.
        findings: Mismatches; notes do not count as errors.
        signature: The signature by one of the keys; None if it was not asked for or none is valid.
        attestations: The attestations by one of the keys, if they were asked for.
    """

    ref: str
    findings: tuple[Finding, ...]
    signature: Signature | None = None
    attestations: tuple[VerifiedAttestation, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every byte matches its digest and, with keys, one of them signed the digests."""
        return not any(finding.severity == "error" for finding in self.findings)

    def __repr__(self) -> str:
        errors = sum(finding.severity == "error" for finding in self.findings)
        outcome = f"{errors} errors" if errors else repr(self.signature) if self.signature else "ok"
        return f"<Verification {self.ref}: {outcome}>"


def sign(
    source: StrPath,
    key: StrPath | Signer,
    *,
    name: str | None = None,
    passphrase: bytes | None = None,
    workspace: Workspace | None = None,
) -> Signature:
    """Sign an adapter: its name and the digest of each of its files, as OpenSSF model signing does.

    The signature is written to `model.sig` in a folder, stored with a version here, or attached to a version at an address.

    Args:
        source: A folder, a ref or an address.
        key: Your private key, in PEM; `pkcs11:…`, the URI of one in hardware; or a signer, such as one by
            `adapterhub.trust.keyless`, which signs by an identity.
        name: The name to sign it as; by default the name of the ref, at the address, or of the folder.
        passphrase: The passphrase of the key, if it is encrypted, or the PIN of its hardware.
        workspace: The registry and the credentials.

    Raises:
        ParameterError: The passphrase is missing or wrong.
        LocalIOError: Others can read the key.

    Example:
        >>> ah.sign("./sql", "team.key")
        <Signature sql: 3 files, as sql by the p256 key ...>
    """
    from adapterhub.trust import signers

    signer = signers.read(key, passphrase)
    signed, _ = signature_checks.sign(source, signer, workspace or Workspace(), name=name)
    return _signature_of(signed, name or signed.name, signer.public)


def sign_for_cosign(
    source: StrPath, key: StrPath | Signer, *, passphrase: bytes | None = None, workspace: Workspace | None = None
) -> Signature:
    """Sign the digest of a version, for every name, as `cosign sign --key` does; at a registry, `cosign verify` finds it.

    The parameters are those of `sign`.

    Raises:
        UsageError: It is a folder, which has no digest.
        ParameterError: The signer is an identity, whose signatures cosign has in other forms.
    """
    from adapterhub.trust import cosign, signers
    from adapterhub.trust.keyless import KeylessSigner

    signer = signers.read(key, passphrase)
    if isinstance(signer, KeylessSigner):
        raise ParameterError("cosign", "is for signatures by a key", "Use `cosign sign` to sign so by an identity")
    with signature_checks.open_signable(source, workspace or Workspace()) as signable:
        if not signable.digest:
            raise UsageError(signable.location, "is a folder, and cosign signs versions", "Push it, and sign the version")
        signable.add(cosign.sign(signable.digest, signable.name, signer))
        return _signature_of(signable, "", signer.public)


def verify(
    source: StrPath,
    *,
    keys: StrPath | Identity | Sequence[StrPath | Identity] = (),
    name: str | None = None,
    attestations: bool = False,
    recompute: Inputs | None = None,
    progress: Progress | None = None,
    workspace: Workspace | None = None,
) -> Verification:
    """Compare bytes with digests: a folder with its adapter.json, a version here or at an address with its manifest.

    With `keys`, one of them must have signed the digests, of all of the files and no others; with `attestations`, one of them
    must have attested something about the version instead.

    Args:
        source: A folder, a ref or an address.
        keys: Public keys in PEM, folders of them, and identities.
        name: The name that it must have been signed as; by default its own. A folder may have any.
        attestations: Verify the attestations of a version.
        recompute: Compute them again from these inputs, and compare.
        progress: Called with bytes read and bytes in all.
        workspace: The registry and the credentials.

    Raises:
        NotFoundError: There is no such adapter, or no such key.

    Example:
        >>> ah.verify("team/sql").ok
        True
        >>> [finding.what for finding in ah.verify("team/sql", keys="other.pub").findings]
        ['is not signed']
    """
    from adapterhub.trust.keys import read_trusted

    workspace = (workspace or Workspace()).with_progress(progress)
    if not keys and (name or attestations):
        parameter = "name" if name else "attestations"
        raise ParameterError(parameter, "is for a signature, and no key is given to verify one with", code="keys-required")
    signature: Signature | None = None
    attested: Sequence[VerifiedAttestation] = ()
    try:
        exact: StrPath = source
        findings: Findings = []
        if attestations:
            signed_version, attested, findings = attest.verify(source, read_trusted(keys), workspace, inputs=recompute)
            exact = signed_version.pinned  # the signed version, even if its tag was moved meanwhile
        elif keys:
            signed_version, accepted = signature_checks.verify(source, read_trusted(keys), workspace, name=name)
            exact, signature = signed_version.pinned, _signature_of(signed_version, accepted.statement.name, accepted.signer)
        findings = [
            *findings,
            *(_byte_findings(exact, workspace) if exact else ()),
        ]  # `exact` is empty for a folder whose files the signature covers
    except IntegrityError as error:  # raised for the document with the digests, or for the signature
        findings = [_error_finding(error)]
    return Verification(os.fspath(source), tuple(findings), signature, tuple(attested))


def _signature_of(signed_version: Signable, name: str, signer: TrustedSigner) -> Signature:
    return Signature(signed_version.location, name, signed_version.digest or None, tuple(sorted(signed_version.files)), signer)


def _error_finding(error: IntegrityError) -> Finding:
    from adapterhub.maintenance.findings import Finding

    code = "signature" if error.code.startswith("signature") else "unreadable"
    return Finding(code, "error", error.where, error.what, error.hint, error.code, error.fields)


def _byte_findings(source: StrPath, workspace: Workspace) -> Findings:
    from adapterhub.maintenance import verify

    if source_names.is_address(source):
        with sources.open_source(source, workspace, for_report=True) as adapter_source:  # the download compares every digest
            return verify.verify_folder(adapter_source.folder)
    path, ref = source_names.resolve(source, workspace)
    with workspace.bar("verifying") as progress:
        if ref is None:
            return verify.verify_folder(Path(source) if path is None else path, progress)
        with workspace.open_registry() as registry:
            return verify.verify(registry, ref, progress)

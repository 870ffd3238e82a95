"""Sign and verify adapters by path, ref or address, as the commands `sign` and `verify` do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_converters.errors import IntegrityError, ParameterError

from . import attesting, sources
from .sharing import signatures
from .workspace import Progress, StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.attesting import Inputs
    from adapterhub.digest import Digest
    from adapterhub.identity import Identity
    from adapterhub.maintenance.findings import Finding, Findings
    from adapterhub.sharing.signatures import Signable
    from adapterhub.trust.attestation import Attested
    from adapterhub.trust.keys import Signer, TrustedSigner


@dataclass(frozen=True, repr=False)
class Signature:
    """A signature of an adapter, made or verified.

    Attributes:
        ref: The ref, the address or the folder of the adapter.
        name: What it is signed as.
        digest: Of the version's manifest; None for a folder.
        files: Paths of the files that are signed, sorted.
        signer: The key, or the identity; `title` describes it, and the `id` of a key is the sha256 of its public PEM.
    """

    ref: str
    name: str
    digest: Digest | None
    files: tuple[str, ...]
    signer: TrustedSigner

    def __repr__(self) -> str:
        return f"<Signature {self.ref}: {len(self.files)} files, as {self.name} by {self.signer.title}>"


@dataclass(frozen=True, repr=False)
class Verified:
    """The result of a verification.

    Attributes:
        ref: What was verified, as it was asked for.
        findings: What does not match; notes do not count as errors.
        signature: The signature by one of the keys; None if none was asked for, or none is valid.
        attestations: What one of the keys attests, if that was asked for.
    """

    ref: str
    findings: tuple[Finding, ...]
    signature: Signature | None = None
    attestations: tuple[Attested, ...] = ()

    @property
    def ok(self) -> bool:
        """True if every byte matches its digest and, with keys, the digests are signed by one of them."""
        return not any(finding.severity == "error" for finding in self.findings)

    def __repr__(self) -> str:
        errors = sum(finding.severity == "error" for finding in self.findings)
        return f"<Verified {self.ref}: {f'{errors} errors' if errors else repr(self.signature) if self.signature else 'ok'}>"


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
        name: What to sign it as; by default the name of the ref, at the address, or of the folder.
        passphrase: That of the key, if it is encrypted; the PIN of its hardware.
        workspace: The registry, the credentials.

    Raises:
        ParameterError: The passphrase is missing or wrong.
        LocalIOError: Others can read the key.

    Example:
        >>> ah.sign("./sql", "team.key")
        <Signature sql: 3 files, as sql by the p256 key ...>
    """
    from adapterhub.trust import signers

    secret = signers.read(key, passphrase)
    made, _ = signatures.sign(source, secret, workspace or Workspace(), name=name)
    return _signature(made, name or made.name, secret.public)


def verify(
    source: StrPath,
    *,
    keys: StrPath | Identity | Sequence[StrPath | Identity] = (),
    name: str | None = None,
    attestations: bool = False,
    recompute: Inputs | None = None,
    progress: Progress | None = None,
    workspace: Workspace | None = None,
) -> Verified:
    """Compare bytes with digests: a folder with its adapter.json, a version here or at an address with its manifest.

    With `keys`, the digests must have been signed by one of them, for all of the files and no others; with `attestations`, one
    of them must have attested something about the version instead.

    Args:
        source: A folder, a ref or an address.
        keys: Public keys in PEM, folders of them, and identities.
        name: The name that it must have been signed as; by default its own. A folder may have any.
        attestations: Verify the attestations of a version.
        recompute: Compute them again from these inputs, and compare.
        progress: Called with bytes read and bytes in all.
        workspace: The registry, the credentials.

    Raises:
        NotFoundError: There is no such adapter, or no such key.

    Example:
        >>> ah.verify("team/sql").ok
        True
        >>> [finding.what for finding in ah.verify("team/sql", keys="other.pub").findings]
        ['is not signed']
    """
    from adapterhub.trust.keys import trusted

    here = (workspace or Workspace()).showing(progress)
    if not keys and (name or attestations):
        parameter = "name" if name else "attestations"
        raise ParameterError(parameter, "is for a signature, and no key is given to verify one with", code="keys-required")
    signature: Signature | None = None
    attested: Sequence[Attested] = ()
    try:
        exact: StrPath = source
        findings: Findings = []
        if attestations:
            found, attested, findings = attesting.verify(source, trusted(keys), here, inputs=recompute)
            exact = found.pinned  # what was signed, wherever its tag is now
        elif keys:
            found, signed = signatures.verify(source, trusted(keys), here, name=name)
            exact, signature = found.pinned, _signature(found, signed.statement.name, signed.signer)
        findings = [*findings, *(_compared(exact, here) if exact else ())]  # all files of a folder are signed
    except IntegrityError as error:  # the document with the digests, or the signature
        findings = [_finding(error)]
    return Verified(os.fspath(source), tuple(findings), signature, tuple(attested))


def _signature(found: Signable, name: str, signer: TrustedSigner) -> Signature:
    return Signature(found.where, name, found.digest or None, tuple(sorted(found.files)), signer)


def _finding(error: IntegrityError) -> Finding:
    from adapterhub.maintenance.findings import Finding

    code = "signature" if error.code.startswith("signature") else "unreadable"
    return Finding(code, "error", error.where, error.what, error.hint, error.code)


def _compared(source: StrPath, workspace: Workspace) -> Findings:
    from adapterhub.maintenance import fsck

    if sources.is_address(source):
        with sources.opened(source, workspace) as found:  # verified as it is fetched
            return fsck.verify_folder(found.folder)
    path, ref = sources.resolve(source, workspace)
    with workspace.bar("verifying") as progress:
        if ref is None:
            return fsck.verify_folder(Path(source) if path is None else path, progress)
        with workspace.opened() as registry:
            return fsck.verify(registry, ref, progress)

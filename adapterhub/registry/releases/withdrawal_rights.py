"""Who may withdraw a signed version: its only signer, by a signed claim, or an admin of the place where it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterhub.digest import sha256_bytes
from adapterhub.manifest.oci_manifest import Manifest
from adapterhub.registry import signature_policy
from adapterhub_converters.errors import AdapterhubError, IntegrityError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from adapterhub.trust.keys import TrustedSigner


@dataclass(frozen=True)
class WithdrawalClaim:
    """A signed claim that a version is withdrawn, and the signer that it is said to be by."""

    bundle: bytes
    signer: TrustedSigner


def check(name: str, number: int, manifest: Manifest, signatures: Sequence[bytes], claim: WithdrawalClaim | None) -> None:
    """Raise RefusedError if a version is signed, and a claim is not by its only signer; for anybody but an admin.

    A writer to a name can add a signature of their own, so that a version with several has no signer who decides.
    """
    from adapterhub.trust import bundle, release_claims, statement

    files = signature_policy.signed_files(manifest)
    own_signatures = [
        raw
        for raw in signatures
        if bundle.predicate_type(raw) == statement.PREDICATE_TYPE and signature_policy.is_about(raw, manifest)
    ]
    if not own_signatures:
        return
    ref, problem = f"{name}:v{number}", "is signed, and only its signer or an admin may withdraw it"
    if claim is None:
        raise RefusedError(ref, problem, "Sign the withdrawal with its key", code="signed-version")
    if len({_signer_in(raw) for raw in own_signatures}) > 1:
        raise RefusedError(ref, "is signed by several, and only an admin may withdraw it", code="signed-version")
    try:
        bundle.find_accepted(own_signatures, [claim.signer], files, None, ref)
        release_claims.verify(claim.bundle, release_claims.WITHDRAWAL, [claim.signer], name=name, digest=manifest.digest)
    except IntegrityError as error:
        raise RefusedError(ref, f"{problem}: {error.what}", error.hint, code="signed-version") from error


def _signer_in(raw: bytes) -> str:
    """Return who claims to have signed a bundle, or the bundle's digest if that cannot be read."""
    from adapterhub.trust import bundle

    try:
        return bundle.claimed_signer(raw, "")
    except AdapterhubError:
        return sha256_bytes(raw)

"""Signed claims about the release of a version: that it is approved for a tag, or that it is withdrawn.

Each is an in-toto statement about one manifest, like an attestation (`attestation`), but what it says is a decision: nobody can
compute it again. The name and the tag are part of what is signed, so that an approval counts for no other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from adapterhub.digest import Digest
from adapterhub_converters.errors import IntegrityError

from . import attestation
from .attestation import Attestation

if TYPE_CHECKING:
    from .keys import Signer, TrustedSigner

APPROVAL, WITHDRAWAL = "urn:adapterhub:attestation:approval:1", "urn:adapterhub:attestation:withdrawal:1"


def sign(type_: str, name: str, digest: Digest, key: Signer, *, text: str, tag: str = "") -> bytes:
    """Return a bundle with the signed claim about a version of a name, for a tag in an approval."""
    return Attestation(type_, name, digest, {"name": name, "tag": tag, "text": text}).sign(key)


def verify(
    raw: bytes, type_: str, signers: Iterable[TrustedSigner], *, name: str, digest: Digest, tag: str = ""
) -> TrustedSigner:
    """Return the one of `signers` who made a claim.

    Raises:
        IntegrityError: None of them signed it, or it claims something else, or it is about another name, digest or tag.
    """
    location = f"{name}@{digest[:19]}…"
    verified = attestation.verify(raw, signers, location)
    claim = verified.attestation
    expected = (type_, digest, name, tag)
    if (claim.type, claim.digest, claim.predicate.get("name"), claim.predicate.get("tag")) != expected:
        raise IntegrityError(location, "the signed claim is about something else", code="signature")
    return verified.signer

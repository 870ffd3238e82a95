"""The bundle that carries a signed statement: Sigstore's v0.3 with a DSSE envelope, by a key or by an identity (`keyless`).

It signs the files of an adapter (`statement`), or something else about it (`attestation`). Only the forms that model_signing
and cosign write are read, and, for a signature of cosign 2, a document with its payload (`cosign`). Anything that could be read
in another way is refused, not ignored: a second signature, a key along with a certificate, a key in the bundle, another type of
payload, another spelling of the same bytes.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adapterhub.digest import Digest, parse_digest
from adapterhub.identity import Identity
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import AdapterhubError, FormatError, IntegrityError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from . import statement
from .statement import SIGN_AGAIN_HINT, Statement

if TYPE_CHECKING:
    from .keys import KeySigner, Signer, TrustedSigner

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
MAX_BUNDLE = 4 << 20  # bytes; a list of files that fits in a manifest of that size fits in a bundle
_KEY, _CERTIFICATE, _LOG, _TIMES = "publicKey", "certificate", "tlogEntries", "timestampVerificationData"
COSIGN_TYPE = "https://sigstore.dev/cosign/sign/v1"
"""The type of statement by which `cosign sign` of cosign 3 signs a manifest: its digest, and no name."""
SIMPLE_SIGNING = "application/vnd.dev.cosign.simplesigning.v1+json"
"""The type of payload by which `cosign sign` of cosign 2 does so (containers/image, `docs/containers-signature.5.md`)."""
ENVELOPE = "dsseEnvelope"
SIMPLE_SIGNING_TYPE = "cosign container image signature"
_NOT_ACCEPTED_HINT = "Have it signed by a signer who is accepted, or accept this one if you trust its owner"
_MAX_REASONS = 5  # in an error


@dataclass(frozen=True)
class SignedStatement:
    """A verified statement, its trusted signer, and the bundle it came in. The name in a statement of cosign is empty."""

    statement: Statement
    signer: TrustedSigner
    raw: bytes


def sign_payload(payload: bytes, key: Signer, location: str) -> bytes:
    """Return a bundle with a signed in-toto statement; RefusedError if it would be too large to be read."""
    from .keyless import KeylessSigner  # needs cryptography

    raw = key.sign_payload(payload, location) if isinstance(key, KeylessSigner) else _sign_with_key(payload, key)
    if len(raw) > MAX_BUNDLE:
        raise RefusedError(location, f"a signature of over {MAX_BUNDLE} bytes", "Sign fewer files")
    return raw


def _sign_with_key(payload: bytes, key: KeySigner) -> bytes:
    """Return a bundle signed by a key."""
    # model_signing leaves keyid empty, and names the key in the hint.
    envelope = {
        "payload": _to_base64(payload),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [{"sig": _to_base64(key.sign(_pre_authentication(payload))), "keyid": ""}],
    }
    material = {_KEY: {"hint": key.public.id}, _LOG: []}
    document = {"mediaType": MEDIA_TYPE, "verificationMaterial": material, ENVELOPE: envelope}
    return json.dumps(document, separators=(",", ":")).encode()


def verify_payload(raw: bytes, signers: Iterable[TrustedSigner], location: str) -> tuple[bytes, TrustedSigner]:
    """Return the statement in a bundle, unparsed, and the one of `signers` that signed it.

    Raises:
        FormatError: It is not a bundle of the forms that are read.
        IntegrityError: None of the signers signed it, or the signature is of other bytes.
        MissingExtraError: One of the identities may have signed it, but `sigstore` is not installed.
    """
    parts, signers = _parts(raw, location), list(signers)
    if parts.certificate:
        from . import keyless  # needs cryptography

        identities = [signer for signer in signers if isinstance(signer, Identity)]
        return parts.payload, keyless.verify(raw, parts.payload, parts.certificate, identities, location)
    # Chosen among the trusted keys: the bundle at most names it, and never brings it along.
    keys = [signer for signer in signers if not isinstance(signer, Identity)]
    candidates = [key for key in keys if not parts.key or parts.key in key.hints]
    for key in candidates:
        if key.verifies(parts.signature, parts.message):
            return parts.payload, key
    if candidates and parts.key:
        raise IntegrityError(
            location, f"the signature is not by the key {candidates[0].source}", SIGN_AGAIN_HINT, code="signature"
        )
    raise IntegrityError(location, f"is signed by {parts.signer}, which is not accepted", _NOT_ACCEPTED_HINT, code="signature")


def sign(signed: Statement, key: Signer) -> bytes:
    """Return a bundle with the signature of an adapter's files."""
    return sign_payload(signed.dump(), key, signed.name)


def verify(raw: bytes, signers: Iterable[TrustedSigner], location: str) -> SignedStatement:
    """Return the files that a bundle signs, if one of `signers` signed it; raises the errors of `verify_payload`."""
    payload, signer = verify_payload(raw, signers, location)
    return SignedStatement(statement.parse(payload, location), signer, raw)


def find_accepted(
    signatures: Sequence[bytes],
    signers: Sequence[TrustedSigner],
    files: Mapping[str, Digest],
    name: str | None,
    location: str,
    *,
    digest: Digest | None = None,
) -> SignedStatement:
    """Return the first statement signed by one of `signers` that covers exactly these files and, unless None, this name.

    Statements about something other than files are skipped.

    Args:
        signatures: Bundles, unverified.
        signers: The accepted signers.
        files: The digests of the files, by path.
        name: The name that a signature must be for; None for any.
        location: The name of the version in errors.
        digest: The digest of its manifest, which cosign signs, for every name; None to accept no signature of cosign.

    Raises:
        IntegrityError: There is no such statement; with the reason for each rejected one.
    """
    # A bundle that cannot be parsed (an empty type) is kept for the reasons.
    signatures = [raw for raw in signatures if predicate_type(raw) in ("", statement.PREDICATE_TYPE, COSIGN_TYPE)]
    reasons: dict[str, AdapterhubError] = {}
    for raw in signatures:
        try:
            if digest is not None and predicate_type(raw) == COSIGN_TYPE:
                return _verify_cosign(raw, signers, files, digest, location)
            signed = verify(raw, signers, location)
            signed.statement.check_files(files, location)
            if name is not None:
                signed.statement.check_name(name, location)
        except AdapterhubError as error:
            reasons.setdefault(error.what, error)
        else:
            return signed
    if len(reasons) == 1:
        raise next(iter(reasons.values()))
    if not reasons:
        raise IntegrityError(location, "is not signed", "Ask its owner to sign it", code="signature-missing")
    problem = f"none of its {len(signatures)} signatures is accepted: {'; '.join(list(reasons)[:_MAX_REASONS])}"
    raise IntegrityError(location, problem, _NOT_ACCEPTED_HINT, code="signature")


def _verify_cosign(
    raw: bytes, signers: Sequence[TrustedSigner], files: Mapping[str, Digest], digest: Digest, location: str
) -> SignedStatement:
    """Return what cosign signed, if one of `signers` did and it is the manifest with this digest."""
    payload, signer = verify_payload(raw, signers, location)
    if cosign_subject(payload, location) != digest:
        raise IntegrityError(location, f"the signature of cosign is not about {digest[:19]}… alone", code="signature")
    return SignedStatement(Statement("", files), signer, raw)


def claimed_payload(raw: bytes, location: str) -> bytes:
    """Return the statement that a bundle claims; nothing is verified."""
    return _parts(raw, location).payload


def claimed_signer(raw: bytes, location: str) -> str:
    """Describe the signer that a bundle names; nothing is verified."""
    parts = _parts(raw, location)
    if not parts.certificate:
        return parts.signer
    from .keyless import claimed_identity  # needs cryptography

    return claimed_identity(parts.certificate, location).title


def predicate_type(raw: bytes) -> str:
    """Return the type of statement that a bundle claims to have; empty if it is not a bundle of a form that is read."""
    try:
        document = json_file.parse_object(claimed_payload(raw, ""), "")
    except AdapterhubError:
        return ""
    return COSIGN_TYPE if "critical" in document else str(document.get("predicateType"))


def attachment_annotations(raw: bytes) -> dict[str, str]:
    """Return the annotations by which cosign finds an attached bundle (sigstore/cosign, `specs/BUNDLE_SPEC.md`)."""
    return {"dev.sigstore.bundle.content": "dsse-envelope", "dev.sigstore.bundle.predicateType": predicate_type(raw)}


def cosign_subject(payload: bytes, location: str) -> Digest | None:
    """Return the digest of the only manifest that a payload of cosign signs; None if that is not one manifest by sha256."""
    document = json_file.parse_object(payload, location)
    if "critical" in document:
        return _signed_image(document, location)
    subjects = document.get("subject")
    # One subject with one digest: anything else could be read as a statement about other bytes.
    subject = subjects[0] if isinstance(subjects, list) and len(subjects) == 1 else None
    digests = subject.get("digest") if isinstance(subject, dict) else None
    sha256 = digests.get("sha256") if isinstance(digests, dict) and len(digests) == 1 else None
    return f"sha256:{sha256}" if isinstance(sha256, str) else None


def _signed_image(document: dict[str, Any], location: str) -> Digest:
    """Return the digest of the manifest that a payload of cosign 2 signs; FormatError for any other form."""
    _with_members(document, ("critical", "optional"), location)
    critical = _with_members(document["critical"], ("identity", "image", "type"), location)
    if critical["type"] != SIMPLE_SIGNING_TYPE:
        raise FormatError(location, f"signs {str(critical['type'])[:80]!r}, not {SIMPLE_SIGNING_TYPE!r}", SIGN_AGAIN_HINT)
    image = _with_members(critical["image"], ("docker-manifest-digest",), location)
    return parse_digest(image["docker-manifest-digest"], location)


@dataclass(frozen=True)
class _BundleParts:
    """The parts of a bundle: the statement, and its signature with a certificate in DER or with the id of a key, if it has one.

    `message` has the bytes that are signed.
    """

    payload: bytes
    message: bytes
    signature: bytes
    key: str = ""
    certificate: bytes = b""

    @property
    def signer(self) -> str:
        """A phrase for the key."""
        return f"the key {self.key[:16]}…" if self.key else "a key that it does not name"


def _parts(raw: bytes, location: str) -> _BundleParts:
    """Split a bundle into its parts, refusing every form that neither model_signing nor cosign writes."""
    if len(raw) > MAX_BUNDLE:
        raise FormatError(location, f"a signature of over {MAX_BUNDLE} bytes", SIGN_AGAIN_HINT)
    try:
        document = json_file.parse_object(raw, location)
    except FormatError as error:
        raise FormatError(location, error.what, SIGN_AGAIN_HINT) from error
    if "mediaType" not in document:
        raise FormatError(location, "not a bundle: it has no 'mediaType'", SIGN_AGAIN_HINT)
    if document["mediaType"] == SIMPLE_SIGNING:
        return _simple_signing_parts(document, location)
    if (kind := document["mediaType"]) != MEDIA_TYPE:
        raise FormatError(location, f"a bundle of the type {str(kind)[:80]!r}, not {MEDIA_TYPE}", SIGN_AGAIN_HINT)
    _with_members(document, ("mediaType", "verificationMaterial", ENVELOPE), location)
    key, certificate = _signer(document["verificationMaterial"], location)
    envelope = _with_members(document[ENVELOPE], ("payload", "payloadType", "signatures"), location)
    if envelope["payloadType"] != PAYLOAD_TYPE:
        raise FormatError(
            location, f"a payload of the type {str(envelope['payloadType'])[:80]!r}, not {PAYLOAD_TYPE}", SIGN_AGAIN_HINT
        )
    signatures = envelope["signatures"]
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise FormatError(location, "not exactly one signature", SIGN_AGAIN_HINT)
    # A missing keyid means the same as an empty one.
    entry = _with_members({"keyid": "", **_object(signatures[0], location)}, ("sig", "keyid"), location)
    if entry["keyid"] != "":
        raise FormatError(location, "does not name its key as model_signing does", SIGN_AGAIN_HINT)
    payload = _from_base64(envelope, "payload", location)
    return _BundleParts(payload, _pre_authentication(payload), _from_base64(entry, "sig", location), key, certificate)


def _simple_signing_parts(document: dict[str, Any], location: str) -> _BundleParts:
    """Return the parts of a signature of cosign 2, whose payload is signed as it is."""
    if _CERTIFICATE in document:
        hint = "Have it signed with a key, or by cosign 3"
        problem = "is signed by an identity in the form of cosign 2, whose log entry has no proof of its inclusion"
        raise FormatError(location, problem, hint)
    _with_members(document, ("mediaType", "payload", "signature"), location)
    payload = _from_base64(document, "payload", location)
    _signed_image(json_file.parse_object(payload, location), location)  # so that it is never taken for another statement
    return _BundleParts(payload, payload, _from_base64(document, "signature", location))


def _signer(value: object, location: str) -> tuple[str, bytes]:
    """Return the id of the key, and the certificate, of the verification material; one of them is empty."""
    material = _object(value, location)
    if _CERTIFICATE in material:
        _with_members(material, (_CERTIFICATE, _LOG), location, also=(_TIMES,))
        if not isinstance(material[_LOG], list) or len(material[_LOG]) != 1:
            raise FormatError(
                location, "is signed by an identity, and has not exactly one entry of a transparency log", SIGN_AGAIN_HINT
            )
        return "", _from_base64(_with_members(material[_CERTIFICATE], ("rawBytes",), location), "rawBytes", location)
    # cosign leaves out an empty log. With a key, entries of a log are not read: the signature holds without them.
    _with_members(material, (_KEY,), location, also=(_LOG, _TIMES))
    if not isinstance(material.get(_LOG, []), list):
        raise FormatError(location, f"{_LOG!r} is not a list", SIGN_AGAIN_HINT)
    if material[_KEY] == {}:  # an attestation of cosign 2 names no key
        return "", b""
    hint = _with_members(material[_KEY], ("hint",), location)["hint"]
    if not isinstance(hint, str) or not hint:
        raise FormatError(location, "does not name its key as model_signing does", SIGN_AGAIN_HINT)
    return hint, b""


def _with_members(value: object, names: tuple[str, ...], location: str, *, also: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return `value` as an object with exactly these members, and perhaps those in `also`."""
    members = _object(value, location)
    for name in members:
        if name not in names + also:
            raise FormatError(location, f"{name[:80]!r} has no place in a bundle of model_signing or cosign", SIGN_AGAIN_HINT)
    for name in names:
        if name not in members:
            raise FormatError(location, f"the bundle has no {name!r}", SIGN_AGAIN_HINT)
    return members


def _object(value: object, location: str) -> dict[str, Any]:
    """Return `value` if it is an object."""
    if not isinstance(value, dict):
        raise FormatError(location, "not a bundle: one of its parts is not an object", SIGN_AGAIN_HINT)
    return value


def _pre_authentication(payload: bytes) -> bytes:
    """Return DSSE's encoding of what is signed (secure-systems-lab/dsse, `protocol.md`), which also binds the payload type."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def _to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _from_base64(members: dict[str, Any], name: str, location: str) -> bytes:
    """Decode base64 in its one canonical spelling: no other alphabet, no spaces, no ignored bits."""
    value = members[name]
    try:
        data = base64.b64decode(value.encode("ascii"), validate=True) if isinstance(value, str) else b""
    except (binascii.Error, UnicodeEncodeError):
        data = b""
    # Encoding again finds the spellings that Python's decoder tolerates.
    if not data or _to_base64(data) != value:
        raise FormatError(location, f"{name!r} is not base64 in its canonical form", SIGN_AGAIN_HINT)
    return data

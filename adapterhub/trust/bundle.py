"""The bundle that carries a signed statement: Sigstore's v0.3 with a DSSE envelope, by a key or by an identity (`keyless`).

It signs the files of an adapter (`statement`), or something else about it (`attestation`). Only the two forms that
model_signing writes are read. Anything that could mean something else is refused, not ignored: a second signature, a key and a
certificate, a key in the bundle, another type of payload, another spelling of the same bytes.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterhub.digest import Digest
from adapterhub.identity import Identity
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import AdapterhubError, FormatError, IntegrityError, RefusedError

from . import statement
from .statement import AGAIN, Statement

if TYPE_CHECKING:
    from .keys import KeySigner, Signer, TrustedSigner

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
MAX_BUNDLE = 4 << 20  # bytes; a list of files that fits a manifest of that size fits a bundle
_KEY, _CERTIFICATE, _LOG, _TIMES = "publicKey", "certificate", "tlogEntries", "timestampVerificationData"
_UNKNOWN = "Have it signed by a signer who is accepted, or accept this one if you trust its owner"
_SHOWN = 5  # reasons in an error


@dataclass(frozen=True)
class Signed:
    """What a bundle signs, the trusted signer of it, and the bundle."""

    statement: Statement
    signer: TrustedSigner
    raw: bytes


def seal(payload: bytes, key: Signer, where: str) -> bytes:
    """Return a bundle with the signature of an in-toto statement; RefusedError for one that is too large to be read."""
    from .keyless import KeylessSigner  # needs cryptography

    raw = key.seal(payload, where) if isinstance(key, KeylessSigner) else _sealed(payload, key)
    if len(raw) > MAX_BUNDLE:
        raise RefusedError(where, f"a signature of over {MAX_BUNDLE} bytes", "Sign fewer files")
    return raw


def _sealed(payload: bytes, key: KeySigner) -> bytes:
    envelope = {
        "payload": _encoded(payload),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [{"sig": _encoded(key.sign(_pre_authentication(payload))), "keyid": ""}],
    }
    material = {_KEY: {"hint": key.public.id}, _LOG: []}
    document = {"mediaType": MEDIA_TYPE, "verificationMaterial": material, "dsseEnvelope": envelope}
    return json.dumps(document, separators=(",", ":")).encode()


def unseal(raw: bytes, signers: Iterable[TrustedSigner], where: str) -> tuple[bytes, TrustedSigner]:
    """Return the statement in a bundle, and the one of `signers` that signed it; nothing of the statement is parsed.

    Raises:
        FormatError: It is not a bundle of the forms that are read.
        IntegrityError: The signature is by none of them, or of other bytes.
        MissingExtraError: It may be by one of the identities, and `sigstore` is not installed.
    """
    parts, signers = _parts(raw, where), list(signers)
    if parts.certificate:
        from . import keyless  # needs cryptography

        identities = [one for one in signers if isinstance(one, Identity)]
        return parts.payload, keyless.verify(raw, parts.payload, parts.certificate, identities, where)
    known = {one.id: one for one in signers if not isinstance(one, Identity)}
    key = known.get(parts.key)
    if key is None:
        raise IntegrityError(
            where, f"is signed by the key {parts.key[:16]}…, which is not accepted", _UNKNOWN, code="signature"
        )
    if not key.verifies(parts.signature, _pre_authentication(parts.payload)):
        raise IntegrityError(where, f"the signature is not by the key {key.where}", AGAIN, code="signature")
    return parts.payload, key


def sign(signed: Statement, key: Signer) -> bytes:
    """Return a bundle with the signature of the files of an adapter."""
    return seal(signed.dump(), key, signed.name)


def verify(raw: bytes, signers: Iterable[TrustedSigner], where: str) -> Signed:
    """Return the files that a bundle signs, if one of `signers` signed it; errors as those of `unseal`."""
    payload, signer = unseal(raw, signers, where)
    return Signed(statement.parse(payload, where), signer, raw)


def accepted(
    signatures: Sequence[bytes], signers: Sequence[TrustedSigner], files: Mapping[str, Digest], name: str | None, where: str
) -> Signed:
    """Return what the first bundle signs that is by one of `signers`, about just these files and, unless None, for this name.

    Statements about something else than files are passed over.

    Raises:
        IntegrityError: There is none; with the reason for each.
    """
    signatures = [raw for raw in signatures if predicate_type(raw) in ("", statement.PREDICATE_TYPE)]
    reasons: dict[str, AdapterhubError] = {}
    for raw in signatures:
        try:
            signed = verify(raw, signers, where)
            signed.statement.check_files(files, where)
            if name is not None:
                signed.statement.check_name(name, where)
        except AdapterhubError as error:
            reasons.setdefault(error.what, error)
        else:
            return signed
    if len(reasons) == 1:
        raise next(iter(reasons.values()))
    if not reasons:
        raise IntegrityError(where, "is not signed", "Ask its owner to sign it", code="signature")
    what = f"none of its {len(signatures)} signatures is accepted: {'; '.join(list(reasons)[:_SHOWN])}"
    raise IntegrityError(where, what, _UNKNOWN, code="signature")


def claimed(raw: bytes, where: str) -> bytes:
    """Return the statement in a bundle; nothing is verified."""
    return _parts(raw, where).payload


def claimed_signer(raw: bytes, where: str) -> str:
    """Describe the signer that a bundle names; nothing is verified."""
    parts = _parts(raw, where)
    if not parts.certificate:
        return f"the key {parts.key[:16]}…"
    from .keyless import claimed  # needs cryptography

    return claimed(parts.certificate, where).title


def predicate_type(raw: bytes) -> str:
    """Return the type of statement that a bundle claims to have; empty if it is not a bundle of the form that is read."""
    try:
        return str(json_file.parse_object(claimed(raw, ""), "").get("predicateType"))
    except AdapterhubError:
        return ""


@dataclass(frozen=True)
class _Parts:
    """What is in a bundle: the statement, and its signature with the id of a key or with a certificate in DER."""

    payload: bytes
    signature: bytes
    key: str
    certificate: bytes


def _parts(raw: bytes, where: str) -> _Parts:
    if len(raw) > MAX_BUNDLE:
        raise FormatError(where, f"a signature of over {MAX_BUNDLE} bytes", AGAIN)
    try:
        document = json_file.parse_object(raw, where)
    except FormatError as error:
        raise FormatError(where, error.what, AGAIN) from error
    if "mediaType" not in document:
        raise FormatError(where, "not a bundle: it has no 'mediaType'", AGAIN)
    if (kind := document["mediaType"]) != MEDIA_TYPE:
        raise FormatError(where, f"a bundle of the type {str(kind)[:80]!r}, not {MEDIA_TYPE}", AGAIN)
    _only(document, ("mediaType", "verificationMaterial", "dsseEnvelope"), where)
    key, certificate = _signer(document["verificationMaterial"], where)
    envelope = _only(document["dsseEnvelope"], ("payload", "payloadType", "signatures"), where)
    if envelope["payloadType"] != PAYLOAD_TYPE:
        raise FormatError(where, f"a payload of the type {str(envelope['payloadType'])[:80]!r}, not {PAYLOAD_TYPE}", AGAIN)
    signatures = envelope["signatures"]
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise FormatError(where, "not exactly one signature", AGAIN)
    entry = _only({"keyid": "", **_object(signatures[0], where)}, ("sig", "keyid"), where)
    if entry["keyid"] != "":
        raise FormatError(where, "does not name its key as model_signing does", AGAIN)
    return _Parts(_decoded(envelope, "payload", where), _decoded(entry, "sig", where), key, certificate)


def _signer(value: object, where: str) -> tuple[str, bytes]:
    """The id of the key, or else the certificate, in the verification material."""
    material = _object(value, where)
    if _CERTIFICATE in material:
        _only(material, (_CERTIFICATE, _LOG), where, also=(_TIMES,))
        if not isinstance(material[_LOG], list) or len(material[_LOG]) != 1:
            raise FormatError(where, "is signed by an identity, and has not exactly one entry of a transparency log", AGAIN)
        return "", _decoded(_only(material[_CERTIFICATE], ("rawBytes",), where), "rawBytes", where)
    _only(material, (_KEY, _LOG), where)
    if material[_LOG] != []:
        raise RefusedError(where, "has entries of a transparency log, and is signed by a key", "Use model_signing")
    hint = _only(material[_KEY], ("hint",), where)["hint"]
    if not isinstance(hint, str) or not hint:
        raise FormatError(where, "does not name its key as model_signing does", AGAIN)
    return hint, b""


def _only(value: object, names: tuple[str, ...], where: str, *, also: tuple[str, ...] = ()) -> dict[str, Any]:
    """An object with these members, and `also` others."""
    found = _object(value, where)
    for name in found:
        if name not in names + also:
            raise FormatError(where, f"{name[:80]!r} has no place in a bundle that model_signing writes", AGAIN)
    for name in names:
        if name not in found:
            raise FormatError(where, f"the bundle has no {name!r}", AGAIN)
    return found


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FormatError(where, "not a bundle: one of its parts is not an object", AGAIN)
    return value


def _pre_authentication(payload: bytes) -> bytes:
    """DSSE's encoding of what is signed (secure-systems-lab/dsse, `protocol.md`): it binds the type of the payload too."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _decoded(found: dict[str, Any], name: str, where: str) -> bytes:
    """Bytes in base64 in their one spelling: no other alphabet, no spaces, no bits that are ignored."""
    value = found[name]
    try:
        data = base64.b64decode(value.encode("ascii"), validate=True) if isinstance(value, str) else b""
    except (binascii.Error, UnicodeEncodeError):
        data = b""
    if not data or _encoded(data) != value:
        raise FormatError(where, f"{name!r} is not base64 in its canonical form", AGAIN)
    return data

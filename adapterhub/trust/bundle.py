"""The bundle that carries a signed statement: Sigstore's v0.3 with a DSSE envelope, by one key and without a certificate.

It signs the files of an adapter (`statement`), or something else about it (`attestation`). Only the one form that model_signing
writes is read. Anything that could mean something else is refused, not ignored: a second signature, a certificate or a key in
the bundle, another type of payload, another spelling of the same bytes.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterhub.digest import Digest
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import AdapterhubError, FormatError, IntegrityError, RefusedError

from . import statement
from .statement import Statement

if TYPE_CHECKING:
    from .keys import PublicKey, Signer

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
MAX_BUNDLE = 4 << 20  # bytes; a list of files that fits a manifest of that size fits a bundle
_KEY = "publicKey"
_SHOWN = 5  # reasons in an error


@dataclass(frozen=True)
class Signed:
    """What a bundle signs, the trusted key that signed it, and the bundle."""

    statement: Statement
    key: PublicKey
    raw: bytes


def seal(payload: bytes, key: Signer, where: str) -> bytes:
    """Return a bundle with the signature of an in-toto statement; RefusedError for one that is too large to be read."""
    envelope = {
        "payload": _encoded(payload),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [{"sig": _encoded(key.sign(_pre_authentication(payload))), "keyid": ""}],
    }
    material = {_KEY: {"hint": key.public.id}, "tlogEntries": []}
    document = {"mediaType": MEDIA_TYPE, "verificationMaterial": material, "dsseEnvelope": envelope}
    raw = json.dumps(document, separators=(",", ":")).encode()
    if len(raw) > MAX_BUNDLE:
        raise RefusedError(where, f"a signature of over {MAX_BUNDLE} bytes", "Sign fewer files")
    return raw


def unseal(raw: bytes, keys: Iterable[PublicKey], where: str) -> tuple[bytes, PublicKey]:
    """Return the statement in a bundle, and the one of `keys` that signed it; nothing of the statement is parsed.

    Raises:
        FormatError: It is not a bundle of the one form that is read.
        IntegrityError: The signature is by none of the keys, or of other bytes.
    """
    signer, payload, signature = _parts(raw, where)
    known = {key.id: key for key in keys}
    key = known.get(signer)
    if key is None:
        raise IntegrityError(where, f"is signed by the key {signer[:16]}…, which is not accepted", code="signature")
    if not key.verifies(signature, _pre_authentication(payload)):
        raise IntegrityError(where, f"the signature is not by the key {key.where}", code="signature")
    return payload, key


def sign(signed: Statement, key: Signer) -> bytes:
    """Return a bundle with the signature of the files of an adapter."""
    return seal(signed.dump(), key, signed.name)


def verify(raw: bytes, keys: Iterable[PublicKey], where: str) -> Signed:
    """Return the files that a bundle signs, if one of `keys` signed it; errors as those of `unseal`."""
    payload, key = unseal(raw, keys, where)
    return Signed(statement.parse(payload, where), key, raw)


def accepted(
    signatures: Sequence[bytes], keys: Sequence[PublicKey], files: Mapping[str, Digest], name: str | None, where: str
) -> Signed:
    """Return what the first bundle signs that is by one of `keys`, about just these files and, unless None, for this name.

    Statements about something else than files are passed over.

    Raises:
        IntegrityError: There is none; with the reason for each.
    """
    signatures = [raw for raw in signatures if predicate_type(raw) in ("", statement.PREDICATE_TYPE)]
    reasons: dict[str, AdapterhubError] = {}
    for raw in signatures:
        try:
            signed = verify(raw, keys, where)
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
        raise IntegrityError(where, "is not signed", code="signature")
    what = f"none of its {len(signatures)} signatures is accepted: {'; '.join(list(reasons)[:_SHOWN])}"
    raise IntegrityError(where, what, code="signature")


def claimed(raw: bytes, where: str) -> bytes:
    """Return the statement in a bundle; nothing is verified."""
    return _parts(raw, where)[1]


def predicate_type(raw: bytes) -> str:
    """Return the type of statement that a bundle claims to have; empty if it is not a bundle of the form that is read."""
    try:
        return str(json_file.parse_object(claimed(raw, ""), "").get("predicateType"))
    except AdapterhubError:
        return ""


def _parts(raw: bytes, where: str) -> tuple[str, bytes, bytes]:
    """The id of the key, the payload and the signature in a bundle."""
    if len(raw) > MAX_BUNDLE:
        raise FormatError(where, f"a signature of over {MAX_BUNDLE} bytes")
    document = json_file.parse_object(raw, where)
    if (kind := document.get("mediaType")) != MEDIA_TYPE:
        raise FormatError(where, f"a bundle of the type {str(kind)[:80]!r}, not {MEDIA_TYPE}")
    _only(document, ("mediaType", "verificationMaterial", "dsseEnvelope"), where)
    material = _only(document["verificationMaterial"], (_KEY, "tlogEntries"), where)
    if material["tlogEntries"] != []:
        raise RefusedError(where, "has entries of a transparency log, and is read as signed by a key", "Use model_signing")
    hint = _only(material[_KEY], ("hint",), where)["hint"]
    envelope = _only(document["dsseEnvelope"], ("payload", "payloadType", "signatures"), where)
    if envelope["payloadType"] != PAYLOAD_TYPE:
        raise FormatError(where, f"a payload of the type {str(envelope['payloadType'])[:80]!r}, not {PAYLOAD_TYPE}")
    signatures = envelope["signatures"]
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise FormatError(where, "not exactly one signature")
    entry = _only({"keyid": "", **_object(signatures[0], where)}, ("sig", "keyid"), where)
    if entry["keyid"] != "" or not isinstance(hint, str) or not hint:
        raise FormatError(where, "does not name its key as model_signing does")
    return hint, _decoded(envelope["payload"], where), _decoded(entry["sig"], where)


def _only(value: object, names: tuple[str, ...], where: str) -> dict[str, Any]:
    """An object with just these members."""
    found = _object(value, where)
    for name in found:
        if name not in names:
            raise FormatError(where, f"{name[:80]!r} has no place in a bundle that is signed by a key")
    for name in names:
        if name not in found:
            raise FormatError(where, f"a bundle without {name!r}")
    return found


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FormatError(where, "not a bundle: an object is missing")
    return value


def _pre_authentication(payload: bytes) -> bytes:
    """DSSE's encoding of what is signed (secure-systems-lab/dsse, `protocol.md`): it binds the type of the payload too."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _decoded(value: object, where: str) -> bytes:
    """Bytes in base64 in their one spelling: no other alphabet, no spaces, no bits that are ignored."""
    try:
        data = base64.b64decode(value.encode("ascii"), validate=True) if isinstance(value, str) else b""
    except (binascii.Error, UnicodeEncodeError):
        data = b""
    if not data or _encoded(data) != value:
        raise FormatError(where, "not base64 in its canonical spelling")
    return data

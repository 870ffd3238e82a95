"""Checkpoints: the signed ends of all logs at one time, to be kept out of reach of anyone who can write to the logs.

A checkpoint is one JSON document: the ends, and a bundle with an in-toto statement whose subject is the digest of the ends as
canonical JSON. Logs may grow after it; what they contained then must still be there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterhub.digest import Digest, is_hex, sha256_bytes
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, IntegrityError
from adapterhub_converters.lazy_dataclass import dataclass

from . import bundle
from .statement import STATEMENT_TYPE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from .keys import Signer, TrustedSigner

PREDICATE_TYPE = "urn:adapterhub:checkpoint:1"
MAX_CHECKPOINT = 64 << 20  # bytes; a name takes a few hundred
_SUBJECT, _BUNDLE = "logs", "bundle"
_HINT = "Sign a new one"


@dataclass(frozen=True)
class Checkpoint:
    """The ends of all logs at one time.

    Attributes:
        time: ISO 8601 in UTC, by the signer's clock.
        ends: Log to name to the number and the digest of the last entry.
        audit: The number and the hash of the newest row of a hub's audit log; None without a hub.
    """

    time: str
    ends: Mapping[str, Mapping[str, tuple[int, Digest]]]
    audit: tuple[int, str] | None = None

    def sign(self, key: Signer, location: str) -> bytes:
        """Return the document with its signature."""
        unsigned = self._document()
        statement = {
            "_type": STATEMENT_TYPE,
            "subject": _subject(unsigned),
            "predicateType": PREDICATE_TYPE,
            "predicate": {"time": self.time},
        }
        signed = json_file.parse_object(bundle.sign_payload(json_file.canonical_bytes(statement), key, location), location)
        return json_file.canonical_bytes({**unsigned, _BUNDLE: signed}) + b"\n"

    def _document(self) -> dict[str, Any]:
        return {"time": self.time, "ends": self.ends, "audit": self.audit}


def read(raw: bytes, signers: Iterable[TrustedSigner], location: str) -> tuple[Checkpoint, TrustedSigner]:
    """Return the checkpoint in a document, and the one of `signers` that signed it.

    Raises:
        FormatError: The document is not a checkpoint.
        IntegrityError: None of the signers signed it, or the signature is of another checkpoint.
    """
    document = json_file.parse_object(raw, location)
    if _BUNDLE not in document:
        raise FormatError(location, "not a checkpoint: it has no signature", _HINT)
    # Without its signature, the document is what the statement's subject covers.
    payload, signer = bundle.verify_payload(json_file.canonical_bytes(document.pop(_BUNDLE)), signers, location)
    statement = json_file.parse_object(payload, location)
    if (statement.get("_type"), statement.get("predicateType")) != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise FormatError(location, f"signs {str(statement.get('predicateType'))[:80]!r}, not {PREDICATE_TYPE}", _HINT)
    if statement.get("subject") != _subject(document):
        raise IntegrityError(location, "was changed after it was signed", "Use a copy that was not", code="signature")
    return _parse_document(document, location), signer


def _subject(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the subject of the statement: the digest of a checkpoint without its signature."""
    return [{"name": _SUBJECT, "digest": {"sha256": sha256_bytes(json_file.canonical_bytes(document)).removeprefix("sha256:")}}]


def _parse_document(document: dict[str, Any], location: str) -> Checkpoint:
    """Parse the checkpoint in a document, whose signer is trusted but may have been careless."""
    time, ends, audit = document.get("time"), document.get("ends"), document.get("audit")
    logs = ends.values() if isinstance(ends, dict) else [None]
    all_ends = [end for log in logs for end in (log.values() if isinstance(log, dict) else [None])]
    if not isinstance(time, str) or not all(map(_is_end, all_ends)) or not (audit is None or _is_end(audit, "")):
        raise FormatError(location, "not a checkpoint: its time or the end of a log is malformed", _HINT)
    log_ends = {log: {name: (seq, digest) for name, (seq, digest) in names.items()} for log, names in document["ends"].items()}
    return Checkpoint(time, log_ends, None if audit is None else (audit[0], audit[1]))


def _is_end(value: object, prefix: str = "sha256:") -> bool:
    """Return whether a value is a pair of an entry's number and its digest."""
    if not isinstance(value, list) or len(value) != 2 or type(value[0]) is not int or value[0] < 1:
        return False
    return isinstance(value[1], str) and value[1].startswith(prefix) and is_hex(value[1].removeprefix(prefix))

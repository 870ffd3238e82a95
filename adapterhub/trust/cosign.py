"""Signatures and attestations of cosign 2, which are layers of an image manifest, as bundles (sigstore/cosign, `specs/`).

The manifest has the tag `sha256-<hex>.sig` or `.att`, after the digest that it is about, or has that digest as its subject
(`--registry-referrers-mode=oci-1-1`). A layer is a DSSE envelope, or the payload that an annotation has the signature of. Both
carry no name of their key. A certificate comes in another annotation, along with an entry of a transparency log that has the
log's promise and no proof of inclusion, which every other signature by an identity has: it is refused with that reason.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from adapterhub.digest import Digest, parse_digest
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError
from adapterhub_converters.lazy_dataclass import dataclass

from .bundle import ENVELOPE, MAX_BUNDLE, MEDIA_TYPE, SIMPLE_SIGNING, SIMPLE_SIGNING_TYPE

if TYPE_CHECKING:
    from .keys import KeySigner

ARTIFACT_TYPE = "application/vnd.dev.cosign.artifact.sig.v1+json"
"""The artifact type of signatures with a subject."""
SIGNATURE_ANNOTATION = "dev.cosignproject.cosign/signature"
_CERTIFICATE_ANNOTATION = "dev.sigstore.cosign/certificate"
_ENVELOPE_LAYER = "application/vnd.dsse.envelope.v1+json"
_MAX_LAYERS = 1000
_PEM_LINE = "-----"


def tags(digest: Digest) -> tuple[str, str]:
    """Return the tags under which cosign 2 keeps the signatures and the attestations of a manifest."""
    stem = digest.replace(":", "-")
    return f"{stem}.sig", f"{stem}.att"


@dataclass(frozen=True)
class CosignLayer:
    """A layer of cosign 2: a signature, an attestation, or something that is not read."""

    media_type: str
    digest: Digest
    size: int
    annotations: Mapping[str, str]

    def bundle(self, raw: bytes) -> bytes:
        """Return the bundle for a layer with these bytes; one of an unknown type is refused when it is verified."""
        if self.media_type == SIMPLE_SIGNING:
            signature = self.annotations.get(SIGNATURE_ANNOTATION, "")
            document = {"payload": base64.b64encode(raw).decode(), "signature": signature, **self._certificate()}
            return json_file.canonical_bytes({"mediaType": SIMPLE_SIGNING, **document})
        if self.media_type != _ENVELOPE_LAYER:
            return json_file.canonical_bytes({"mediaType": self.media_type})
        certificate = self._certificate()
        material = {**certificate, "tlogEntries": []} if certificate else {"publicKey": {}}
        return json_file.canonical_bytes(
            {"mediaType": MEDIA_TYPE, "verificationMaterial": material, ENVELOPE: json_file.parse_object(raw, self.digest)}
        )

    def _certificate(self) -> dict[str, dict[str, str]]:
        """Return the certificate as a bundle has it, without checking it; empty without one."""
        pem = self.annotations.get(_CERTIFICATE_ANNOTATION)
        if pem is None:
            return {}
        return {"certificate": {"rawBytes": "".join(line for line in pem.splitlines() if not line.startswith(_PEM_LINE))}}


def layers(raw: bytes, location: str) -> Iterator[CosignLayer]:
    """Yield the layers of a manifest of cosign that can be bundles; FormatError for another form, also of a single layer."""
    entries = json_file.parse_object(raw, location).get("layers")
    if not isinstance(entries, list) or len(entries) > _MAX_LAYERS:
        raise FormatError(location, f"has no list of at most {_MAX_LAYERS} layers")
    for entry in entries:
        layer = _parse_layer(entry, location)
        if layer.size <= MAX_BUNDLE:
            yield layer


def _parse_layer(entry: Any, location: str) -> CosignLayer:
    entry = entry if isinstance(entry, dict) else {}
    size, annotations = entry.get("size"), entry.get("annotations") or {}
    if (
        type(size) is not int
        or size < 0
        or not isinstance(annotations, dict)
        or not all(isinstance(value, str) for value in annotations.values())
    ):
        raise FormatError(location, "a layer is not a descriptor")
    return CosignLayer(str(entry.get("mediaType")), parse_digest(entry.get("digest"), location), size, annotations)


def sign(digest: Digest, name: str, key: KeySigner) -> bytes:
    """Return the bundle with a signature of a manifest as `cosign sign --key` makes it; the name is for people only."""
    critical = {
        "identity": {"docker-reference": name},
        "image": {"docker-manifest-digest": digest},
        "type": SIMPLE_SIGNING_TYPE,
    }
    payload = json_file.canonical_bytes({"critical": critical, "optional": None})
    annotations = {SIGNATURE_ANNOTATION: base64.b64encode(key.sign(payload)).decode()}
    return CosignLayer(SIMPLE_SIGNING, digest, len(payload), annotations).bundle(payload)


def layer_of(bundle: bytes, location: str) -> tuple[bytes, dict[str, str]] | None:
    """Return the layer by which cosign 2 stores a signature, and its annotations; None for any other bundle."""
    document = json_file.parse_object(bundle, location)
    if document.get("mediaType") != SIMPLE_SIGNING:
        return None
    try:
        payload = base64.b64decode(str(document.get("payload")), validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(location, "'payload' is not base64") from error
    return payload, {SIGNATURE_ANNOTATION: str(document.get("signature"))}

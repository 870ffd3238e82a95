"""Signatures and attestations of cosign 2 at a place that keeps attachments, read and stored as bundles (`trust.cosign`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial

from adapterhub.digest import Digest, sha256_bytes
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.remotes.download import read_blob
from adapterhub.remotes.protocol import ReferringTarget
from adapterhub.store.signature_files import UNREADABLE, Sized
from adapterhub.trust import cosign
from adapterhub.trust.bundle import SIMPLE_SIGNING
from adapterhub_converters.errors import NotFoundError

from . import referrers

_FILE = "cosign.json"
"""The file name under which a signature of cosign is attached."""


def bundles(place: ReferringTarget, digest: Digest) -> Iterator[Sized]:
    """Yield the size of each layer that cosign 2 has about a manifest, and what reads it as a bundle.

    Anyone who can write there can store anything: what is not in the form of cosign is left out.
    """
    for reference in (*cosign.tags(digest), *_attached(place, digest)):
        label = f"{place.location}:{reference}"
        with suppress(*UNREADABLE):
            for layer in cosign.layers(place.read_document(reference), label):
                yield layer.size, partial(_read, place, layer, label)


def attach(place: ReferringTarget, subject: Manifest, layer: tuple[bytes, Mapping[str, str]]) -> None:
    """Attach a signature of cosign 2 to a manifest, as `cosign sign --registry-referrers-mode=oci-1-1` does."""
    raw, annotations = layer
    blob = Descriptor(SIMPLE_SIGNING, sha256_bytes(raw), len(raw), _FILE)
    manifest = referrers.attachment_bytes(subject, cosign.ARTIFACT_TYPE, [blob], blob_annotations=annotations)
    referrers.attach_manifest(place, subject, manifest, blob, raw)


def _attached(place: ReferringTarget, digest: Digest) -> list[Digest]:
    """Return the digests of the manifests of cosign with another as their subject."""
    with suppress(NotFoundError):
        return [referrer.digest for referrer in referrers.referrers(place, digest, cosign.ARTIFACT_TYPE)]
    return []


def _read(place: ReferringTarget, layer: cosign.CosignLayer, label: str) -> bytes:
    return layer.bundle(read_blob(place, Descriptor(layer.media_type, layer.digest, layer.size, ""), label))

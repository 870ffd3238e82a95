"""Signatures and attestations of cosign 2 at a place that keeps attachments, read and stored as bundles (`trust.cosign`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial

from adapterhub.digest import Digest, sha256_bytes
from adapterhub.manifest.oci_manifest import MANIFEST_TYPE, Descriptor, Manifest
from adapterhub.remotes.download import read_blob
from adapterhub.remotes.protocol import ReferringTarget
from adapterhub.store.signature_files import UNREADABLE, Sized
from adapterhub.trust import cosign
from adapterhub.trust.bundle import SIMPLE_SIGNING
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import NotFoundError, RemoteError

from . import referrers

_FILE = "cosign.json"
"""The file name under which a signature of cosign is attached."""
_MAX_TRIES = 5  # updates of a tag that others update as well


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


def tag(place: ReferringTarget, digest: Digest, layer: tuple[bytes, Mapping[str, str]]) -> None:
    """Add an attached signature to those under the tag where `cosign verify` looks without being told of attachments."""
    raw, annotations = layer
    reference, entry = cosign.tags(digest)[0], {"mediaType": SIMPLE_SIGNING, "digest": sha256_bytes(raw), "size": len(raw)}
    entry["annotations"] = dict(annotations)
    # A tag is not written atomically: read it again, and repeat if another writer's manifest replaced ours.
    for _ in range(_MAX_TRIES):
        try:
            document = json_file.parse_object(place.read_document(reference), f"{place.location}:{reference}")
        except NotFoundError:
            document = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": referrers.EMPTY_CONFIG}
        entries = document.get("layers", [])
        if entry in entries:
            return
        manifest = json_file.canonical_bytes({**document, "layers": [*entries, entry]})
        place.put_document(manifest, sha256_bytes(manifest), reference)
    raise RemoteError(place.location, "others are changing the signatures at the same time", "Try again")


def _attached(place: ReferringTarget, digest: Digest) -> list[Digest]:
    """Return the digests of the manifests of cosign with another as their subject."""
    with suppress(NotFoundError):
        return [referrer.digest for referrer in referrers.referrers(place, digest, cosign.ARTIFACT_TYPE)]
    return []


def _read(place: ReferringTarget, layer: cosign.CosignLayer, label: str) -> bytes:
    return layer.bundle(read_blob(place, Descriptor(layer.media_type, layer.digest, layer.size, ""), label))

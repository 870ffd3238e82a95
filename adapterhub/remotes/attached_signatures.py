"""Signatures and attestations of a version, attached to it at another place, or read from there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial

from adapterhub.digest import Digest, sha256_bytes
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.manifest.package_files import SIGNATURE
from adapterhub.registry.signature_policy import LIMIT, is_about
from adapterhub.store.signature_files import UNREADABLE, Sized, read_bounded
from adapterhub.trust import attestation, bundle, cosign, statement
from adapterhub_converters.errors import FormatError, RefusedError

from .local_name import LocalName
from .oci import cosign_claims, referrers
from .parallel_transfer import unwrapped
from .protocol import OpenRemote, Source

_ATTESTATION_FILE = "attestation.sigstore.json"
"""The file name under which an attestation is attached; a signature is attached as `model.sig`, as in a folder."""


def stored(source: Source, digest: Digest) -> list[bytes]:
    """Return the signatures of a manifest that its place stores; empty if it stores no attachments."""
    place = unwrapped(source)
    if isinstance(place, LocalName):
        return place.registry.store.signatures.read(digest, LIMIT)
    referring = place.as_referring_target() if isinstance(place, OpenRemote) else None
    if referring is None:
        raw = place.file_signature(digest) if isinstance(place, OpenRemote) else None
        return [raw] if raw is not None else []

    def sized_signatures() -> Iterator[Sized]:
        for referrer in referrers.referrers(referring, digest, bundle.MEDIA_TYPE):
            with suppress(*UNREADABLE):  # anyone who can write there can attach anything
                file = referrers.single_file(referring, referrer, digest, LIMIT)
                yield file.size, partial(referrers.read_file, referring, referrer, file)
        yield from cosign_claims.bundles(referring, digest)

    return read_bounded(sized_signatures())


def attach_all(remote: OpenRemote, manifest: Manifest, signatures: Sequence[bytes]) -> int:
    """Attach signatures to a version that was copied to an address, if it stores attachments; return their number.

    A place that keeps files alone takes one of them, as `model.sig` beside the files.
    """
    # A place without attachments still gets the version; the caller decides whether that needs a note.
    if not signatures or remote.as_referring_target() is None:
        return int(any(is_about(raw, manifest) and _put_file(remote, manifest, raw) for raw in signatures))
    attached = 0
    for raw in signatures:
        # A signature that is malformed or about other files is no reason to fail a copy that has succeeded.
        with suppress(FormatError, RefusedError):
            attached += is_about(raw, manifest) and attach(remote, manifest, raw)
    return attached


def _put_file(remote: OpenRemote, manifest: Manifest, signature: bytes) -> bool:
    """Write a signature of the files beside them; return False for any other claim, and where no such file is kept."""
    is_of_files = bundle.predicate_type(signature) == statement.PREDICATE_TYPE
    return is_of_files and remote.put_file_signature(manifest, signature)


def attach(remote: OpenRemote, manifest: Manifest, signature: bytes) -> bool:
    """Attach one signature or attestation to a version at an address; return True."""
    referring = remote.as_referring_target()
    if referring is None:
        if _put_file(remote, manifest, signature):
            return True
        raise remote.unsupported_error("attachments", "Sign the folder before you push it, or use an OCI registry")
    if layer := cosign.layer_of(signature, manifest.digest):
        cosign_claims.attach(referring, manifest, layer)
        if remote.hides_signature_tags:
            cosign_claims.tag(referring, manifest.digest, layer)
        return True
    file = _ATTESTATION_FILE if attestation.attestation_bundles([signature]) else SIGNATURE
    blob = Descriptor(bundle.MEDIA_TYPE, sha256_bytes(signature), len(signature), file)
    referrers.attach_document(referring, manifest, blob, signature, bundle.attachment_annotations(signature))
    return True

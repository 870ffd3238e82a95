"""`copy`: an adapter from anywhere to anywhere, under the same digest."""

from __future__ import annotations

from dataclasses import dataclass

from adapterhub.digest import sha256_bytes
from adapterhub.manifest import card
from adapterhub.manifest.document import AdapterManifest
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import IntegrityError, RefusedError

from .parallel import JOBS, Move, Pace
from .protocol import Progress, Put, Source, Target


@dataclass(frozen=True, slots=True)
class Copied:
    """What a copy did: the manifest, how many bytes of blobs were sent, the rest being there, and what became of the tag."""

    manifest: Manifest
    sent: int
    put: Put


def copy(
    source: Source,
    reference: str,
    target: Target,
    tag: str | None,
    progress: Progress | None = None,
    *,
    jobs: int = JOBS,
    pace: Pace | None = None,
) -> Copied:
    """Have a version of `source` in `target`: its files, its config, its manifest, and then the tag. What is there stays.

    `jobs` blobs go at once; the first error stops them all, and the next run resumes where each stopped.
    """
    made = source.manifest(reference)
    blobs = unique(made)
    move = Move(blobs, progress, jobs, pace)
    watched = move.watched(source)

    def one(blob: Descriptor) -> int:
        return 0 if target.has(blob) else target.put_blob(blob, watched)

    sent = sum(move.each(one, blobs, source, target))
    return Copied(made, sent, target.put_manifest(made, tag))


def unique(made: Manifest) -> list[Descriptor]:
    """The blobs of a manifest, each once, the config last."""
    return list({blob.digest: blob for blob in (*made.layers, made.config)}.values())


def read_manifest(source: Source, made: Manifest, where: str) -> AdapterManifest:
    """Fetch the adapter.json of a version, of which no other file is needed; its bytes are verified.

    Raises:
        RefusedError: The version has no adapter.json, so that nothing is known of it before its files are fetched.
    """
    blob = made.adapter_json
    if blob is None or blob.size > json_file.MAX_CONFIG:
        what = f"no {ADAPTER_JSON} to compare with the project's policy"
        raise RefusedError(where, what, "Copy it to a registry without a policy first, which derives one", code="no-manifest")
    return AdapterManifest.parse(read_blob(source, blob, where), f"{where}: {ADAPTER_JSON}")


def declared(source: Source, made: Manifest, manifest: AdapterManifest, where: str) -> AdapterManifest:
    """The manifest of a version with what its model card declares besides; the card is fetched, and its bytes are verified."""
    return card.fill(manifest, card.decode(read_blob(source, made.card, where))) if made.card else manifest


def read_blob(source: Source, blob: Descriptor, where: str) -> bytes:
    """The verified bytes of a small blob, whose size the caller has limited."""
    raw, buffer = bytearray(), memoryview(bytearray(1 << 16))
    with source.open_blob(blob) as reader:
        while len(raw) <= blob.size and (n := reader.readinto(buffer)):
            raw += buffer[:n]
    if (sha256_bytes(bytes(raw)), len(raw)) != (blob.digest, blob.size):
        raise IntegrityError(f"{where}: {blob.path}", f"received {len(raw)} bytes that do not match {blob.digest}")
    return bytes(raw)

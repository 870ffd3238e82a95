"""`copy`: an adapter from anywhere to anywhere, under the same digest."""

from __future__ import annotations

from dataclasses import dataclass

from adapterhub.manifest import Descriptor, Manifest

from .remote import Progress, Source, Target


@dataclass(frozen=True, slots=True)
class Copied:
    """What a copy did: the manifest, and how many bytes of blobs were sent; the rest was there."""

    manifest: Manifest
    sent: int


def copy(source: Source, reference: str, target: Target, tag: str | None, progress: Progress | None = None) -> Copied:
    """Have a version of `source` in `target`: its files, its config, its manifest, and then the tag. What is there stays."""
    made = source.manifest(reference)
    blobs = unique(made)
    total, done, sent = sum(blob.size for blob in blobs), 0, 0
    for blob in blobs:
        if not target.has(blob):
            sent += target.put_blob(blob, source)
        done += blob.size
        if progress:
            progress(done, total)
    target.put_manifest(made, tag)
    return Copied(made, sent)


def unique(made: Manifest) -> list[Descriptor]:
    """The blobs of a manifest, each once, the config last."""
    return list({blob.digest: blob for blob in (*made.layers, made.config)}.values())

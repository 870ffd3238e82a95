"""`copy`: an adapter from anywhere to anywhere, under the same digest."""

from __future__ import annotations

from dataclasses import dataclass

from adapterhub.manifest.oci_manifest import Descriptor, Manifest

from .parallel import JOBS, Move, Pace
from .protocol import Progress, Source, Target


@dataclass(frozen=True, slots=True)
class Copied:
    """What a copy did: the manifest, and how many bytes of blobs were sent; the rest was there."""

    manifest: Manifest
    sent: int


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

    `jobs` blobs go at once; the first error stops them all, and what each had got to is gone on with by the next run.
    """
    made = source.manifest(reference)
    blobs = unique(made)
    move = Move(blobs, progress, jobs, pace)
    watched = move.watched(source)

    def one(blob: Descriptor) -> int:
        return 0 if target.has(blob) else target.put_blob(blob, watched)

    sent = sum(move.each(one, blobs, source, target))
    target.put_manifest(made, tag)
    return Copied(made, sent)


def unique(made: Manifest) -> list[Descriptor]:
    """The blobs of a manifest, each once, the config last."""
    return list({blob.digest: blob for blob in (*made.layers, made.config)}.values())

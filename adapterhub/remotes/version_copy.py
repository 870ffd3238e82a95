"""`copy_version`: an adapter from anywhere to anywhere, under the same digest."""

from __future__ import annotations

from adapterhub.manifest import card
from adapterhub.manifest.document import AdapterManifest
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .download import read_blob
from .parallel_transfer import JOBS, RateLimit, Transfer
from .protocol import Progress, PutResult, Source, Target


@dataclass(frozen=True, slots=True)
class CopyResult:
    """The result of a copy: the manifest, how many bytes of missing blobs were sent, and the change of the tag."""

    manifest: Manifest
    sent: int
    put_result: PutResult


def copy_version(
    source: Source,
    reference: str,
    target: Target,
    tag: str | None,
    progress: Progress | None = None,
    *,
    jobs: int = JOBS,
    pace: RateLimit | None = None,
) -> CopyResult:
    """Copy a version from `source` to `target`: its files, its config, its manifest, then the tag. What is there already stays.

    `jobs` blobs are copied at a time; the first error stops them all, and the next run resumes where each one stopped.
    """
    manifest = source.manifest(reference)
    blobs = distinct_blobs(manifest)
    move = Transfer(blobs, progress, jobs, pace)
    watched = move.watch(source)

    def copy_blob(blob: Descriptor) -> int:
        # Blobs are named by digest, so one that is there has the right bytes.
        return 0 if target.has_blob(blob) else target.put_blob(blob, watched)

    sent = sum(move.run_all(copy_blob, blobs, source, target))
    # The manifest, and with it the tag, last: nobody sees a version whose blobs are not all there.
    return CopyResult(manifest, sent, target.put_manifest(manifest, tag))


def distinct_blobs(manifest: Manifest) -> list[Descriptor]:
    """Return the blobs of a manifest, each once, the config last."""
    return list({blob.digest: blob for blob in (*manifest.layers, manifest.config)}.values())


def read_adapter_manifest(source: Source, manifest: Manifest, location: str) -> AdapterManifest:
    """Fetch only the adapter.json of a version, and verify its bytes.

    Raises:
        RefusedError: The version has no adapter.json, so nothing is known about it before its files are fetched.
    """
    blob = manifest.adapter_json
    if blob is None or blob.size > json_file.MAX_CONFIG:
        problem = f"no {ADAPTER_JSON} to compare with the project's policy"
        raise RefusedError(
            location, problem, "Copy it to a registry without a policy first, which derives one", code="no-manifest"
        )
    return AdapterManifest.parse(read_blob(source, blob, location), f"{location}: {ADAPTER_JSON}")


def with_card(source: Source, manifest: Manifest, adapter_manifest: AdapterManifest, location: str) -> AdapterManifest:
    """Return the manifest of a version completed by its model card, which is fetched and verified."""
    return (
        card.with_card(adapter_manifest, card.decode(read_blob(source, manifest.card, location)))
        if manifest.card
        else adapter_manifest
    )

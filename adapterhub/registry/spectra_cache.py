"""The spectra of a registry's adapters on one base, computed once per version and cached.

The files in `cache/` may be deleted at any time, and `gc` removes those that were not used for long (`conversion_cache`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import astuple
from typing import TYPE_CHECKING

from adapterhub.analysis import spectra
from adapterhub.analysis.spectra import SpectralSummaries, SpectralSummary
from adapterhub.index import version_search
from adapterhub_converters.adapter_files import resolve_adapter
from adapterhub_converters.containers import atomic, json_file
from adapterhub_converters.errors import AdapterhubError, LocalIOError, OutputExistsError
from adapterhub_converters.formats import convert

if TYPE_CHECKING:
    from pathlib import Path

    from adapterhub.index.queries import VersionRow
    from adapterhub.manifest.document import BaseInfo

    from .registry import Registry

MAX_ADAPTERS = 200  # the newest adapters of a base; each takes some seconds the first time
_FILE, _FORMAT = "spectra.json", 1
_MAX_FILE = 32 << 20  # bytes


def spectra_on_base(registry: Registry, base: BaseInfo, *, without: str = "") -> Iterator[SpectralSummaries]:
    """Yield the spectra of the newest version of every name on a base, latest first; versions without any are skipped.

    Args:
        registry: The registry with the versions.
        base: The base, by its repository; where both fingerprints are known, they must be equal.
        without: A name to leave out.
    """
    if not base.repo:
        return
    query = version_search.Query(facets=(("base", base.repo),), limit=MAX_ADAPTERS)
    for row in version_search.search(registry.index, query).rows:
        if row.name != without and row.base == base.repo and _is_same_base(registry, row, base):
            version_spectra = _version_spectra(registry, row)
            if version_spectra:
                yield version_spectra


def _is_same_base(registry: Registry, row: VersionRow, base: BaseInfo) -> bool:
    manifest = registry.adapter_manifest(row.digest) if base.fingerprint else None
    fingerprint = manifest.base.fingerprint if manifest else None
    return not fingerprint or fingerprint == base.fingerprint


def _version_spectra(registry: Registry, row: VersionRow) -> SpectralSummaries:
    key = hashlib.sha256(json.dumps(["spectra", _FORMAT, row.digest]).encode()).hexdigest()
    entry = registry.store.root / "cache" / key
    version_spectra = _cached_spectra(registry, entry)
    if version_spectra is None:
        version_spectra = _compute_spectra(registry, row)
        document = {target: astuple(spectrum) for target, spectrum in version_spectra.items()}
        # Only a cache: a full disk or a read-only registry is not an error, nor is another process that wrote it first.
        with contextlib.suppress(LocalIOError, OSError, OutputExistsError), atomic.pending_output(entry) as folder:
            (folder / _FILE).write_text(json.dumps(document))
    return version_spectra


def _cached_spectra(registry: Registry, entry: Path) -> SpectralSummaries | None:
    files = registry.store.files
    with contextlib.suppress(AdapterhubError, OSError, TypeError, ValueError):
        document = json_file.parse_object(files.read(entry / _FILE, _MAX_FILE), str(entry))
        files.touch(entry)  # the time of its last use, which a gc reads
        return {target: SpectralSummary(*map(float, numbers)) for target, numbers in document.items()}
    return None


def _compute_spectra(registry: Registry, row: VersionRow) -> SpectralSummaries:
    from adapterhub.store.export import linked_folder

    try:
        with registry.lease_version(row.ref) as version, linked_folder(registry.store, registry.files(version)) as folder:
            return spectra.spectra(convert.read(resolve_adapter(folder)))[0]
    except AdapterhubError:  # a kind of adapter without spectra, or a version that was removed meanwhile
        return {}

"""The norms of a registry's adapters on one base, computed once for each version and cached.

What is in `cache/` may be deleted at any time, and `gc` removes what was not used for long (`conversion_cache`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import astuple
from typing import TYPE_CHECKING

from adapterhub.analysis import spectra
from adapterhub.analysis.spectra import Spectra, Spectrum
from adapterhub.index import search
from adapterhub_converters.adapter_files import adapter_in
from adapterhub_converters.containers import atomic, json_file
from adapterhub_converters.errors import AdapterhubError, LocalIOError, OutputExistsError
from adapterhub_converters.formats import convert

if TYPE_CHECKING:
    from pathlib import Path

    from adapterhub.index.queries import Row
    from adapterhub.manifest.document import BaseInfo

    from .registry import Registry

MAX_ADAPTERS = 200  # of a population: the newest; each takes some seconds the first time
_FILE, _FORMAT = "spectra.json", 1
_MAX_FILE = 32 << 20  # bytes


def others(registry: Registry, base: BaseInfo, *, without: str = "") -> Iterator[Spectra]:
    """Yield the numbers of the newest version of every name on a base, the latest first; a version without any is left out.

    Args:
        registry: Where they are.
        base: The base by its name; where both know its fingerprint, this must be the same.
        without: A name to leave out.
    """
    if not base.repo:
        return
    query = search.Query(facets=(("base", base.repo),), limit=MAX_ADAPTERS)
    for row in search.search(registry.index, query).rows:
        if row.name != without and row.base == base.repo and _is_same(registry, row, base):
            found = _spectra(registry, row)
            if found:
                yield found


def _is_same(registry: Registry, row: Row, base: BaseInfo) -> bool:
    manifest = registry.adapter_manifest(row.digest) if base.fingerprint else None
    other = manifest.base.fingerprint if manifest else None
    return not other or other == base.fingerprint


def _spectra(registry: Registry, row: Row) -> Spectra:
    key = hashlib.sha256(json.dumps(["spectra", _FORMAT, row.digest]).encode()).hexdigest()
    entry = registry.store.root / "cache" / key
    found = _kept(registry, entry)
    if found is None:
        found = _computed(registry, row)
        document = {target: astuple(one) for target, one in found.items()}
        # A full disk or a read-only registry is not an error, nor is another process that was faster.
        with contextlib.suppress(LocalIOError, OSError, OutputExistsError), atomic.whole(entry) as folder:
            (folder / _FILE).write_text(json.dumps(document))
    return found


def _kept(registry: Registry, entry: Path) -> Spectra | None:
    files = registry.store.files
    with contextlib.suppress(AdapterhubError, OSError, TypeError, ValueError):
        document = json_file.parse_object(files.read(entry / _FILE, _MAX_FILE), str(entry))
        files.touch(entry)  # the time of its last use, which a gc reads
        return {target: Spectrum(*map(float, numbers)) for target, numbers in document.items()}
    return None


def _computed(registry: Registry, row: Row) -> Spectra:
    from adapterhub.store.export import linked

    try:
        with registry.reading(row.ref) as version, linked(registry.store, registry.files(version)) as folder:
            return spectra.spectra(convert.read(adapter_in(folder)))[0]
    except AdapterhubError:  # of another kind, or removed meanwhile
        return {}

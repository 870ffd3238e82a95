"""The versions at an address: what each tag is at, read from its manifest and, for an adapter, from its adapter.json."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from adapterhub import references
from adapterhub.digest import Digest
from adapterhub.manifest.oci_manifest import Manifest
from adapterhub_converters.adapter_files import is_weights
from adapterhub_converters.errors import FormatError, IntegrityError, NotFoundError, RefusedError

from .copy import read_manifest
from .protocol import Connected

ADAPTER, IMAGE, OTHER = "adapter", "image", "other"
_IMAGE_OF = "io.adapterhub.digest"
_BASE = "io.adapterhub.base.repo"
_NOT_READ = (FormatError, IntegrityError, NotFoundError, RefusedError)


@dataclass(frozen=True, slots=True)
class Listed:
    """A version with its tags.

    Attributes:
        tags: Its tags, the number first.
        kind: ADAPTER, IMAGE for a container image that contains one, or OTHER.
        digest: Of its manifest; empty if that is not one of an adapter or an image.
        size: Bytes of its files.
        base: The base model's name.
        created: When its training began, ISO 8601 in UTC.
    """

    tags: tuple[str, ...]
    kind: str
    digest: Digest = ""
    size: int | None = None
    base: str | None = None
    created: str | None = None


def versions(remote: Connected, tags: Sequence[str]) -> list[Listed]:
    """The versions that these tags are at, the highest number first; a manifest that cannot be read is one by itself."""
    found: dict[str, tuple[Manifest | None, list[str]]] = {}
    with ThreadPoolExecutor(remote.at_once) as pool:
        for tag, made in zip(tags, pool.map(lambda tag: _manifest(remote, tag), tags), strict=True):
            found.setdefault(made.digest if made else tag, (made, []))[1].append(tag)
        listed = list(pool.map(lambda one: _listed(remote, *one), found.values()))
    return sorted(listed, key=lambda one: (-(references.number(one.tags[0]) or 0), one.tags))


def _manifest(remote: Connected, tag: str) -> Manifest | None:
    with suppress(*_NOT_READ):
        return remote.manifest(tag)
    return None


def _listed(remote: Connected, made: Manifest | None, tags: Sequence[str]) -> Listed:
    ordered = tuple(sorted(tags, key=lambda tag: (references.number(tag) is None, tag)))
    if made is None:
        return Listed(ordered, OTHER)
    kind = ADAPTER if any(is_weights(layer.path) for layer in made.layers) else OTHER
    kind = IMAGE if _IMAGE_OF in made.annotations else kind
    base, created = made.annotations.get(_BASE), None
    if kind == ADAPTER:
        with suppress(*_NOT_READ):
            manifest = read_manifest(remote, made, remote.where)
            base = manifest.base.repo or base
            created = manifest.training.created if manifest.training else None
    return Listed(ordered, kind, made.digest, made.size, base, created)

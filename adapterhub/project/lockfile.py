"""The lock file of a project: the version of each of its adapters, by digest, and where it was found.

`adapters.lock` is JSON with sorted keys, so that the same content gives the same bytes and a change is a small diff. The digest
is that of the manifest, which fixes the bytes of every file; a tag that moves later has no effect.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from adapterhub import user_files
from adapterhub.digest import Digest, parse_digest
from adapterhub.manifest.oci_manifest import Manifest
from adapterhub.manifest.package_files import check_paths
from adapterhub_converters import safe_regex
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, NotFoundError, RefusedError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

FILE = "adapters.lock"
LOCAL_REGISTRY = "registry"
"""The source of a version from the local registry."""
_VERSION = 1
_LOCK_AGAIN_HINT = "Lock it again"
_BASE_ANNOTATIONS = {key: f"io.adapterhub.base.{key}" for key in ("repo", "revision", "fingerprint")}  # annotations
_NAME_PART = safe_regex.Pattern(r"[A-Za-z0-9]+(?:[._-]+[A-Za-z0-9]+)*")


@dataclass(frozen=True)
class LockedAdapter:
    """One adapter of a lock file.

    Attributes:
        name: `namespace/name`, or its counterpart elsewhere: a relative path.
        ref: The ref as the user gave it, which an update resolves again.
        source: `LOCAL_REGISTRY`, or the address that the ref had at the time.
        digest: The digest of the manifest.
        size: Bytes of all files.
        base: `repo`, `revision` and `fingerprint` of its base, as far as the manifest has them.
    """

    name: str
    ref: str
    source: str
    digest: Digest
    size: int
    base: Mapping[str, str] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """Return the entry as JSON."""
        return {"ref": self.ref, "source": self.source, "digest": self.digest, "size": self.size, "base": dict(self.base)}


Lock = dict[str, LockedAdapter]


def entry(name: str, ref: str, source: str, manifest: Manifest) -> LockedAdapter:
    """Return the entry of a version with the given manifest."""
    base = {key: manifest.annotations[label] for key, label in _BASE_ANNOTATIONS.items() if label in manifest.annotations}
    # The lock file is shown in diffs and terminals, where control characters could mislead.
    if not all(value.isprintable() for value in base.values()):
        raise FormatError(ref, "its manifest has unprintable text about its base")
    return LockedAdapter(check_name(name, ref), ref, source, manifest.digest, manifest.size, base)


def name_of(repository: str) -> str:
    """Return the name that an address without a version gets in a lock: the last two parts of its path."""
    scheme, _, path = repository.partition("://")
    parts = [part for part in path.split("/") if part]
    # hf:// addresses have no host; the first part is the organization.
    return "/".join((parts if scheme == "hf" else parts[1:])[-2:])


def check_name(name: str, location: str) -> str:
    """Return `name` if it is a valid relative path of a folder on every system."""
    if not all(_NAME_PART.fullmatch(part) for part in name.split("/")):
        raise FormatError(location, f"{name[:80]!r} is not a valid name in {FILE}")
    check_paths([name], location)
    return name


def parse(text: str, location: str) -> Lock:
    """Parse a lock file; the empty text has no entries."""
    if not text:
        return {}
    document = json_file.parse_object(text, location)
    adapters = document.get("adapters")
    if document.get("version") != _VERSION or not isinstance(adapters, dict):
        raise FormatError(location, f"not a lock file of version {_VERSION}", "A newer adapterhub may have written it")
    check_paths(adapters, location)
    return {name: _parse_entry(name, value, location) for name, value in adapters.items()}


def _parse_entry(name: str, value: Any, location: str) -> LockedAdapter:
    """Parse one entry of a lock file."""
    location = f"{location}: {name[:80]}"
    check_name(name, location)
    if not isinstance(value, dict) or set(value) != {"ref", "source", "digest", "size", "base"}:
        raise FormatError(location, 'is not an object with "ref", "source", "digest", "size" and "base"', _LOCK_AGAIN_HINT)
    ref, source, size, base = value["ref"], value["source"], value["size"], value["base"]
    texts = [ref, source, *(base.values() if isinstance(base, dict) else [None])]
    if not all(isinstance(text, str) and text.isprintable() for text in texts) or set(base) - set(_BASE_ANNOTATIONS):
        raise FormatError(location, '"ref", "source" and "base" are not strings', _LOCK_AGAIN_HINT)
    if type(size) is not int or not 0 <= size < 2**63:
        raise FormatError(location, '"size" is not a number of bytes', _LOCK_AGAIN_HINT)
    return LockedAdapter(name, ref, source, parse_digest(value["digest"], location), size, base)


def dump(lock: Lock) -> str:
    """Return the canonical text of a lock."""
    document = {"version": _VERSION, "adapters": {name: locked.document() for name, locked in lock.items()}}
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def read(path: Path) -> Lock:
    """Read a lock file; NotFoundError if it is missing."""
    if not os.path.lexists(path):
        raise NotFoundError(str(path), "there is no lock file", "Lock an adapter", code="no-lock-file")
    return parse(user_files.read(path, follow=False), str(path))


def record(path: Path, entries: Mapping[str, LockedAdapter]) -> bool:
    """Write entries into a lock file, keeping all others; return whether that changed it."""

    def updated_text(text: str) -> str | None:
        updated = dump({**parse(text, str(path)), **entries})
        return updated if updated != text else None

    return user_files.change(path, updated_text, follow=False)


def find(lock: Lock, ref: str, path: Path) -> LockedAdapter:
    """Return the entry of a ref; RefusedError if there is none, or only one for another version."""
    name = ref.rpartition("://")[2].partition("@")[0].partition(":")[0]
    locked = lock.get(name) or next(
        (candidate for candidate in lock.values() if ref in (candidate.ref, candidate.source)), None
    )
    if locked is None:
        problem = f"is not in {path}, which has {', '.join(lock) or 'no adapters'}"
        raise RefusedError(ref, problem, "Lock it", code="not-locked", ref=ref)
    # A digest that agrees is fine, however the lock names the version.
    exact = ref == f"{name}@{locked.digest}"
    if not exact and ref not in (name, locked.ref, locked.source):
        problem = f"{path} has {locked.ref} ({locked.digest[:19]})"
        raise RefusedError(ref, problem, "Lock this one instead", code="not-locked", ref=ref)
    return locked


def select(lock: Lock, names: tuple[str, ...], path: Path) -> Lock:
    """Return the entries with these names, or all entries if no names are given."""
    if unknown := [name for name in names if name not in lock]:
        raise UsageError(unknown[0][:200], f"is not a name in {path}", f"It has {', '.join(lock) or 'no adapters'}")
    return {name: lock[name] for name in names or lock}


# --- folders


def check_no_link(folder: Path, above: Path) -> None:
    """Raise RefusedError for a link between `above` and `folder`: a repository may bring one that leads anywhere."""
    path = above
    for part in folder.relative_to(above).parts:
        path = path / part
        if path.is_symlink():
            problem = "a link, which the lock file of a project does not follow"
            raise RefusedError(str(path), problem, "Remove it, or name the folder to write to", code="link-in-project")

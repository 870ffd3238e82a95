"""The differences between two versions of an adapter: the facts of adapter.json that changed, and the files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from adapterhub_converters.lazy_dataclass import dataclass

from .document import AdapterManifest, FileEntry

ADDED, REMOVED, CHANGED = "added", "removed", "changed"
# `files` has a comparison of its own, and `modules` is compared with the weights.
_COMPARED_ELSEWHERE = ("$schema", "schema_version", "files", "modules")
# Values that mean the same as a missing key.
_ABSENT: tuple[Any, ...] = (None, [], {}, "")


@dataclass(frozen=True, slots=True)
class FactChange:
    """One fact of adapter.json: a dotted key, its old and its new value; None where it is absent."""

    key: str
    old: Any
    new: Any


@dataclass(frozen=True, slots=True)
class FileChange:
    """A file that only one of two versions has, or that has other bytes; None where it is absent.

    Attributes:
        lines: The lines of a text that differ, with `-` or `+` before them; empty if they were not compared.
    """

    path: str
    old: FileEntry | None
    new: FileEntry | None
    lines: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        """`added`, `removed` or `changed`."""
        return ADDED if self.old is None else REMOVED if self.new is None else CHANGED


def facts(old: AdapterManifest, new: AdapterManifest) -> tuple[FactChange, ...]:
    """Return the facts that differ, in the order of the document; a record that only one has, such as a training, is one."""
    old_document, new_document = old.to_dict(), new.to_dict()
    differences: list[FactChange] = []
    for key in (key for key in {**old_document, **new_document} if key not in _COMPARED_ELSEWHERE):
        before, after = (None if side.get(key) in _ABSENT else side.get(key) for side in (old_document, new_document))
        both_maps = isinstance(before, Mapping) and isinstance(after, Mapping)
        differences += (
            _changes(key, before, after) if both_maps else [FactChange(key, before, after)] if before != after else []
        )
    return tuple(differences)


def files(old: Iterable[FileEntry], new: Iterable[FileEntry]) -> tuple[FileChange, ...]:
    """Return the files that differ, sorted by path."""
    old_files, new_files = ({entry.path: entry for entry in side} for side in (old, new))
    return tuple(
        FileChange(path, old_files.get(path), new_files.get(path))
        for path in sorted({*old_files, *new_files})
        if old_files.get(path) != new_files.get(path)
    )


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[FactChange]:
    """Return the values that differ between two documents: maps value by value, and for `files` the digests by path."""
    return _changes("", old, new)


def _changes(prefix: str, old: Any, new: Any) -> list[FactChange]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(key for key in new if key not in old)]
        return [change for key in keys for change in _changes(f"{prefix}.{key}" if prefix else key, old.get(key), new.get(key))]
    if prefix == "files":
        return _changes(prefix, *({file["path"]: file["digest"] for file in side or ()} for side in (old, new)))
    if old is None and isinstance(new, Mapping):
        return [change for key, value in new.items() for change in _changes(f"{prefix}.{key}" if prefix else key, None, value)]
    return [] if old == new else [FactChange(prefix, old, new)]

"""What is in the folder that a version is to be written to: another version, unmodified, or something of the user's own.

A folder is a version if its adapter.json names every file in it with the digest that the file has. Such a folder may be
replaced by another version, as nothing in it is lost if somebody else has that version, which the caller knows. Files that both
versions have are linked, so that they stay where they are for the programs that read them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adapterhub.digest import Digest, copy_hashing, sha256_bytes
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.containers import atomic
from adapterhub_converters.containers.inside import Inside
from adapterhub_converters.errors import AdapterhubError, ConflictError, LocalIOError, OutputExistsError

from . import oci_manifest
from .document import AdapterManifest
from .oci_manifest import Descriptor, Manifest
from .package_files import shortened, survey


@dataclass(frozen=True)
class PresentFile:
    """A file that was hashed, and the inode that it was."""

    digest: Digest
    size: int
    inode: tuple[int, ...]


@dataclass(frozen=True)
class Present:
    """A folder that is not empty.

    Attributes:
        folder: Its path.
        files: Path to content, of the files that a version could have.
        others: All other files but dotfiles.
        digest: Of the version that the folder is; None for one that was edited, and for anything else.
        changed: The files that tell it from the version in its adapter.json, each with how: `README.md (edited)`.
    """

    folder: Path
    files: Mapping[str, PresentFile] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    digest: Digest | None = None
    changed: tuple[str, ...] = ()

    def __str__(self) -> str:
        """What is lost when it is replaced."""
        if self.changed:
            return f"what has changed in {self.folder}: {shortened(self.changed)}"
        return f"the version {self.digest[:19]}" if self.digest else f"the files of {self.folder}"

    def holds(self, made: Manifest) -> bool:
        """Tell whether it has exactly the files of a version, besides dotfiles, and an adapter.json where that has none."""
        wanted = {layer.path: (layer.digest, layer.size) for layer in made.layers}
        there = {path: (file.digest, file.size) for path, file in self.files.items()}
        if made.adapter_json is None and ADAPTER_JSON in there:
            from . import describe  # needs numpy, which commands that only copy do without

            try:
                raw = describe.settle(self.folder, wanted)[1]
            except AdapterhubError:
                return False
            wanted[ADAPTER_JSON] = (sha256_bytes(raw), len(raw))
        return there == wanted and not self.others

    def check_lost(self, known: Callable[[Digest], bool]) -> None:
        """Raise OutputExistsError if replacing the folder loses something; `known` tells whether a version is elsewhere."""
        if self.changed and self.digest is None:
            what = f"exists, and is not as its adapter.json records it: {shortened(self.changed)}"
            raise OutputExistsError(str(self.folder), what)
        if self.changed:
            raise OutputExistsError(
                str(self.folder), f"exists, and has files that are part of no version: {shortened(self.changed)}"
            )
        if self.digest is None or not known(self.digest):
            raise OutputExistsError(str(self.folder))

    def has(self, layer: Descriptor) -> bool:
        """Tell whether a file of a version is there with the same bytes."""
        return layer.path in self.files and self.files[layer.path].digest == layer.digest

    def keep(self, path: str, target: Path) -> None:
        """Name a file `target` as well: the same inode, or a copy on a file system without hard links."""
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(self.folder / path, target, follow_symlinks=False)
            same = _inode(target.lstat()) == self.files[path].inode
        except OSError:
            with Inside(self.folder).open(self.folder / path) as file, open(target, "xb", buffering=0) as copy:
                same = copy_hashing(file, copy)[0] == self.files[path].digest
        if not same:
            raise self._changed(path)

    def check_unchanged(self) -> None:
        """Raise ConflictError if a file was edited since the folder was looked at."""
        for path, file in self.files.items():
            try:
                same = _inode((self.folder / path).lstat()) == file.inode
            except OSError:
                same = False
            if not same:
                raise self._changed(path)

    def _changed(self, path: str) -> ConflictError:
        return ConflictError(
            f"{self.folder}/{path}", "was edited meanwhile; nothing was written", "Run it again", code="changed-meanwhile"
        )


def look(folder: Path) -> Present | None:
    """What is in `folder`; None if it is absent or empty.

    Raises:
        OutputExistsError: It is a file or a link.
        LocalIOError: It cannot be read.
    """
    try:
        atomic.check_free(folder)
    except OutputExistsError:
        if folder.is_symlink() or not folder.is_dir():
            raise
    else:
        return None
    try:
        files, skipped, refused = survey(folder, strict=True)
        hashed = dict(_hashed(folder, files))
    except LocalIOError:
        raise
    except AdapterhubError:
        return Present(folder)
    others = sorted([*skipped, *(path for path, *_ in refused)])
    return _compared(folder, hashed, others)


def _hashed(folder: Path, files: Iterable[str]) -> Iterator[tuple[str, PresentFile]]:
    inside = Inside(folder)
    for path in files:
        try:
            with inside.open(folder / path) as file:
                inode = _inode(os.fstat(file.fileno()))
                yield path, PresentFile(*copy_hashing(file, None), inode)
        except OSError as error:
            raise LocalIOError(str(folder / path), error.strerror or str(error)) from error


def _inode(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _compared(folder: Path, files: Mapping[str, PresentFile], others: Iterable[str]) -> Present:
    """The folder and how it differs from its own adapter.json."""
    more = tuple(path for path in others if not path.rpartition("/")[2].startswith("."))
    added = [f"{path} (added)" for path in others]
    try:
        manifest = AdapterManifest.read(folder)
    except AdapterhubError:
        return Present(folder, files, more, None, (f"{ADAPTER_JSON} (edited)",))
    if manifest is None:
        return Present(folder, files, more)
    recorded = {entry.path: (entry.digest, entry.size) for entry in manifest.files}
    found = {path: (file.digest, file.size) for path, file in files.items() if path != ADAPTER_JSON}
    changed = [f"{path} (missing)" for path in recorded if path not in found]
    changed += [f"{path} (added)" for path in found if path not in recorded]
    changed += [f"{path} (edited)" for path in recorded if path in found and found[path] != recorded[path]]
    if changed:
        return Present(folder, files, more, None, tuple(sorted([*changed, *added])))
    everything = {path: (file.digest, file.size) for path, file in files.items()}
    return Present(folder, files, more, oci_manifest.assemble(everything, manifest).digest, tuple(added))

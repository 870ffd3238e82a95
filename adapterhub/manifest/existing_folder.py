"""The folder that a version is to be written to: a version itself, unmodified, or something of the user's own.

A folder is a version if its adapter.json names every file in it with the digest that the file has. Such a folder may be
replaced by another version, as long as the version that it is exists elsewhere, which the caller knows. Files that both
versions have are linked, so that they stay the same files for the programs that read them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import field
from pathlib import Path

from adapterhub.digest import Digest, copy_hashing, sha256_bytes
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.containers import atomic
from adapterhub_converters.containers.confined_files import ConfinedFiles
from adapterhub_converters.errors import AdapterhubError, ConflictError, LocalIOError, OutputExistsError
from adapterhub_converters.lazy_dataclass import dataclass

from . import oci_manifest
from .document import AdapterManifest
from .oci_manifest import Descriptor, Manifest
from .package_files import shorten_names, survey


@dataclass(frozen=True)
class HashedFile:
    """A file that was hashed, and its inode at the time."""

    digest: Digest
    size: int
    inode: tuple[int, ...]


@dataclass(frozen=True)
class ExistingFolder:
    """A folder that is not empty.

    Attributes:
        folder: Its path.
        files: Path to content, for the files that a version could have.
        other_paths: All other files except dotfiles.
        digest: The version that the folder is; None if it was edited, or is anything else.
        changed: The files that differ from the version in its adapter.json, each with how: `README.md (edited)`.
    """

    folder: Path
    files: Mapping[str, HashedFile] = field(default_factory=dict)
    other_paths: tuple[str, ...] = ()
    digest: Digest | None = None
    changed: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return what is lost if the folder is replaced."""
        if self.changed:
            return f"what has changed in {self.folder}: {shorten_names(self.changed)}"
        return f"the version {self.digest[:19]}" if self.digest else f"the files of {self.folder}"

    def holds(self, manifest: Manifest) -> bool:
        """Return True if the folder has exactly the files of a version; dotfiles are ignored.

        If the version has no adapter.json, the folder may have the one that would be derived from the version's files.
        """
        expected_files = {layer.path: (layer.digest, layer.size) for layer in manifest.layers}
        present_files = {path: (file.digest, file.size) for path, file in self.files.items()}
        if manifest.adapter_json is None and ADAPTER_JSON in present_files:
            from . import derive  # needs numpy, which commands that only copy do without

            try:
                raw = derive.finalize(self.folder, expected_files)[1]
            except AdapterhubError:
                return False
            expected_files[ADAPTER_JSON] = (sha256_bytes(raw), len(raw))
        return present_files == expected_files and not self.other_paths

    def check_lost(self, is_elsewhere: Callable[[Digest], bool]) -> None:
        """Raise OutputExistsError if replacing the folder loses something.

        Args:
            is_elsewhere: Returns True if a version exists elsewhere.
        """
        if self.changed and self.digest is None:
            problem = f"exists, and is not as its adapter.json records it: {shorten_names(self.changed)}"
            raise OutputExistsError(str(self.folder), problem)
        if self.changed:
            raise OutputExistsError(
                str(self.folder), f"exists, and has files that are part of no version: {shorten_names(self.changed)}"
            )
        if self.digest is None or not is_elsewhere(self.digest):
            raise OutputExistsError(str(self.folder))

    def has_file(self, layer: Descriptor) -> bool:
        """Return True if the folder has a file of a version with the same bytes."""
        return layer.path in self.files and self.files[layer.path].digest == layer.digest

    def link_or_copy(self, path: str, target: Path) -> None:
        """Link a file as `target`, too, or copy it on a file system without hard links; ConflictError if it was edited."""
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Compared after linking: the file may have been edited since it was hashed.
            os.link(self.folder / path, target, follow_symlinks=False)
            same = _inode(target.lstat()) == self.files[path].inode
        except OSError:
            with ConfinedFiles(self.folder).open(self.folder / path) as file, open(target, "xb", buffering=0) as copy:
                same = copy_hashing(file, copy)[0] == self.files[path].digest
        if not same:
            raise self._changed_error(path)

    def check_unchanged(self) -> None:
        """Raise ConflictError if a file was edited since the folder was inspected."""
        for path, file in self.files.items():
            try:
                same = _inode((self.folder / path).lstat()) == file.inode
            except OSError:
                same = False
            if not same:
                raise self._changed_error(path)

    def _changed_error(self, path: str) -> ConflictError:
        return ConflictError(
            f"{self.folder}/{path}", "was edited meanwhile; nothing was written", "Run it again", code="changed-meanwhile"
        )


def inspect_folder(folder: Path) -> ExistingFolder | None:
    """Return the contents of `folder`; None if it is absent or empty.

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
        hashed = dict(_hash_files(folder, files))
    except LocalIOError:
        raise
    except AdapterhubError:  # no version could have these files
        return ExistingFolder(folder)
    other_paths = sorted([*skipped, *(path for path, *_ in refused)])
    return _compare_with_manifest(folder, hashed, other_paths)


def _hash_files(folder: Path, files: Iterable[str]) -> Iterator[tuple[str, HashedFile]]:
    inside = ConfinedFiles(folder)
    for path in files:
        try:
            with inside.open(folder / path) as file:
                inode = _inode(os.fstat(file.fileno()))
                yield path, HashedFile(*copy_hashing(file, None), inode)
        except OSError as error:
            raise LocalIOError(str(folder / path), error.strerror or str(error)) from error


def _inode(status: os.stat_result) -> tuple[int, ...]:
    # With size and time, as an edit in place keeps the inode.
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _compare_with_manifest(folder: Path, files: Mapping[str, HashedFile], other_paths: Iterable[str]) -> ExistingFolder:
    """Return the folder, compared with its own adapter.json."""
    visible_paths = tuple(path for path in other_paths if not path.rpartition("/")[2].startswith("."))
    added = [f"{path} (added)" for path in other_paths]
    try:
        manifest = AdapterManifest.read(folder)
    except AdapterhubError:
        return ExistingFolder(folder, files, visible_paths, None, (f"{ADAPTER_JSON} (edited)",))
    if manifest is None:
        return ExistingFolder(folder, files, visible_paths)
    recorded = {entry.path: (entry.digest, entry.size) for entry in manifest.files}
    present_files = {path: (file.digest, file.size) for path, file in files.items() if path != ADAPTER_JSON}
    changed = [f"{path} (missing)" for path in recorded if path not in present_files]
    changed += [f"{path} (added)" for path in present_files if path not in recorded]
    changed += [f"{path} (edited)" for path in recorded if path in present_files and present_files[path] != recorded[path]]
    if changed:
        return ExistingFolder(folder, files, visible_paths, None, tuple(sorted([*changed, *added])))
    # Unchanged, so this is a version: its digest tells whether it exists elsewhere.
    all_files = {path: (file.digest, file.size) for path, file in files.items()}
    return ExistingFolder(folder, files, visible_paths, oci_manifest.assemble(all_files, manifest).digest, tuple(added))

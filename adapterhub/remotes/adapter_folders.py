"""Folders of adapters: one as a source, and a new one to download a version into."""

from __future__ import annotations

import contextlib
import glob
import io
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor  # codespell:ignore
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from adapterhub.digest import Digest, is_hex, sha256_bytes, sha256_file
from adapterhub.manifest import existing_folder, oci_manifest
from adapterhub.manifest.existing_folder import ExistingFolder
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.manifest.package_files import check_names, listing
from adapterhub.ref import LATEST
from adapterhub.store.leases import ABANDONED
from adapterhub.store.store import local_errors, open_regular
from adapterhub.user_files import is_only_mine
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.containers import atomic
from adapterhub_converters.containers.confined_files import ConfinedFiles
from adapterhub_converters.errors import AdapterhubError, LocalIOError, NotFoundError

from .download import PAUSES, receive
from .parallel_transfer import JOBS, RateLimit, Transfer
from .protocol import Progress, Reader, Source

if TYPE_CHECKING:
    from adapterhub.manifest.derive import Draft

SendAhead = Callable[[str, int, Source], Digest | None]


class AdapterFolder:
    """The adapter in a folder, as a push publishes it; nothing is written to the folder.

    Args:
        folder: The adapter's own folder.
        location: Its name in errors.
        send_ahead: Takes a large file, by its name and size, before its digest is known, and returns the digest; None if it
            does not take the file.
        draft: What was read of the folder already.
        ahead: The hashing of its large files, if that has begun.
    """

    def __init__(
        self,
        folder: Path,
        location: str = "",
        send_ahead: SendAhead | None = None,
        draft: Draft | None = None,
        ahead: HashingAhead | None = None,
    ) -> None:
        from adapterhub.manifest import derive  # needs numpy, which a pull does without

        self.folder = folder
        self.location = location or str(folder)
        draft = draft or derive.draft(folder)  # before anything is sent: this may be no adapter at all
        self.skipped = draft.listing.skipped
        digests = {folder / path: draft.digests.get(folder / path) for path in draft.listing.files}
        if ahead:
            digests |= {path: digest or ahead.digest(path) for path, digest in digests.items()}
        files = {
            path: _digest_and_size(folder / path, path, send_ahead, digests[folder / path]) for path in draft.listing.files
        }
        manifest, raw = draft.finalize(files)
        self._manifest = oci_manifest.complete(files, manifest, raw)
        self._bytes = {self._manifest.config.digest: self._manifest.config_bytes, sha256_bytes(raw): raw}
        # Blobs are served by digest, wherever the file is in the folder.
        self._paths = {layer.digest: folder / layer.path for layer in self._manifest.layers}

    def manifest(self, reference: str) -> Manifest:
        """Return the only manifest, by its digest or as `latest`."""
        if reference not in (LATEST, self._manifest.digest):
            raise NotFoundError(f"{self.location}: {reference}", "a folder has one version", "Remove the tag")
        return self._manifest

    @contextlib.contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        """Open a file for reading; the config and adapter.json may exist only in memory."""
        data = self._bytes.get(blob.digest)
        if data is None and blob.digest not in self._paths:
            raise NotFoundError(self.location, f"no file with the digest {blob.digest}")
        file: Any = io.BytesIO(data) if data is not None else open_regular(self._paths[blob.digest])
        with file:
            file.seek(start)
            yield file

    def tags(self) -> list[str]:
        """Return no tags: a folder is a single version."""
        return []

    def stop(self, *, on: bool = True) -> None:
        """Do nothing: files are read at once."""


MIN_SENT_AHEAD = 32 << 20  # bytes; a file that takes long enough to hash to be sent in the meantime


class _SingleFile:
    """A single file as a source, whatever digest is asked for."""

    def __init__(self, path: Path) -> None:
        self._path, self.location = path, str(path.parent)

    def manifest(self, reference: str) -> Manifest:
        raise NotFoundError(self.location, f"has no {reference}")

    @contextlib.contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        with open_regular(self._path) as file:
            file.seek(start)
            yield cast(Reader, file)

    def tags(self) -> list[str]:
        return []

    def stop(self, *, on: bool = True) -> None:
        pass


def _digest_and_size(file: Path, path: str, send_ahead: SendAhead | None, digest: Digest | None) -> tuple[Digest, int]:
    """Return the digest and the size of a file; one of unknown digest is sent while it is hashed if `send_ahead` takes it."""
    with local_errors(file):
        size = file.stat().st_size
    # A large file is hashed while it is sent, so that it is read only once.
    if digest is None and send_ahead and size >= MIN_SENT_AHEAD:
        digest = send_ahead(path, size, _SingleFile(file))
    return digest or sha256_file(file), size


class HashingAhead:
    """Hashing of the large files of a folder on a second thread, while the adapter is checked. A context manager.

    Args:
        folder: The folder; files in folders inside are left out.
        is_wanted: Asked on that thread before anything is hashed: whether the files are not sent while they are hashed.
    """

    def __init__(self, folder: Path, is_wanted: Callable[[], bool]) -> None:
        self._is_wanted, self._stopped = is_wanted, threading.Event()
        self._pool = ThreadPoolExecutor(1)
        with local_errors(folder):
            files = [Path(entry.path) for entry in os.scandir(folder) if _is_large(entry)]
        self._digests = {file: self._pool.submit(self._digest, file) for file in files}

    def digest(self, path: Path) -> Digest | None:
        """Return the digest of a file, once it is computed; None of a file that is not hashed here."""
        return self._digests[path].result() if path in self._digests else None

    def _digest(self, path: Path) -> Digest | None:
        return sha256_file(path, self._check_stop) if self._is_wanted() else None

    def _check_stop(self, size: int) -> None:
        if self._stopped.is_set():
            raise CancelledError  # codespell:ignore

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)


def _is_large(entry: os.DirEntry[str]) -> bool:
    return entry.is_file(follow_symlinks=False) and entry.stat().st_size >= MIN_SENT_AHEAD


def download(
    source: Source,
    reference: Digest | str,
    out: Path,
    progress: Progress | None = None,
    *,
    replacing: Callable[[ExistingFolder], object] | None = None,
    pauses: Sequence[float] = PAUSES,
    jobs: int = JOBS,
    pace: RateLimit | None = None,
    on_unchanged: Callable[[], object] | None = None,
) -> Manifest:
    """Write the files of a version into the folder `out`: all of them, verified, or none.

    After a run that was killed, the next one resumes: until then, the received bytes stay next to `out`. If the version has no
    adapter.json, as other tools make it, that file is derived as in a push. If `out` already has these files, `on_unchanged` is
    called, and nothing is written.

    Args:
        source: The source that has the version.
        reference: Its tag or digest.
        out: Absent, empty, or what `replacing` admits.
        progress: Called with the bytes received and the bytes in total.
        replacing: Called with the files in `out` before they are replaced, to raise OutputExistsError if they must not be. By
            default they must be a version that `source` has.
        pauses: Seconds between attempts.
        jobs: Number of files to receive at a time.
        pace: Limits the rate.
        on_unchanged: Called if there is nothing to do.

    Raises:
        OutputExistsError: `out` has something that would be lost.
    """
    present_files = existing_folder.inspect_folder(out)
    manifest = source.manifest(reference)
    if present_files is not None:
        if present_files.holds(manifest):
            if on_unchanged:
                on_unchanged()
            return manifest
        if replacing is None:
            present_files.check_lost(lambda digest: has_version(source, digest))
        else:
            replacing(present_files)
        atomic.check_free(out, replace=True)
    # The names come from the source: none may lead out of the folder.
    check_names((layer.path for layer in manifest.layers), source.location)
    target = Path(os.path.abspath(out))
    # The digest is in the name, so that only a pull of the same version resumes these files.
    scratch = target.parent / f".{target.name}.pull-{manifest.digest[7:19]}"
    kept_paths = {layer.path for layer in manifest.layers if present_files is not None and present_files.has_file(layer)}
    # Files that `out` has already are linked or copied into the new folder rather than received.
    layers = list({layer.digest: layer for layer in manifest.layers if layer.path not in kept_paths}.values())
    _receive_files(source, layers, scratch, Transfer(layers, progress, jobs, pace), pauses=pauses)
    try:
        with atomic.pending_output(out, replace=present_files is not None) as folder, _errors_name(folder, source.location):
            _assemble_folder(folder, manifest, scratch, present_files, kept_paths)
    finally:  # everything was received: another run would end the same way
        shutil.rmtree(scratch, ignore_errors=True)
        _remove_abandoned(scratch)
    return manifest


def _receive_files(
    source: Source, layers: Sequence[Descriptor], scratch: Path, move: Transfer, *, pauses: Sequence[float]
) -> None:
    """Receive files into the scratch folder, which stays for the next run if this one does not get them all."""
    watched = move.watch(source)
    files = ConfinedFiles(scratch)

    def receive_file(layer: Descriptor) -> None:
        with receive(watched, layer, files, _part_path(scratch, layer), pauses=pauses):
            pass

    _make_scratch(scratch)
    try:
        move.run_all(receive_file, layers, source)
    finally:
        with contextlib.suppress(OSError):
            scratch.rmdir()  # if it is empty


def has_version(source: Source, digest: Digest) -> bool:
    """Return whether a source has a version, by its digest."""
    try:
        return source.manifest(digest).digest == digest
    except NotFoundError:
        return False


def _part_path(scratch: Path, layer: Descriptor) -> Path:
    return scratch / f"{layer.digest[7:]}.part"


def _make_scratch(scratch: Path) -> None:
    """Create a folder of our own for incomplete files; refuse one that another user owns or can write to."""
    with local_errors(scratch):
        scratch.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            scratch.mkdir(mode=0o700)
        info = scratch.lstat()
    if not stat.S_ISDIR(info.st_mode) or not is_only_mine(info):
        problem = "is not a folder, or others own it or can write to it"
        raise LocalIOError(str(scratch), problem, "Remove it, or write to another folder")


def _remove_abandoned(scratch: Path) -> None:
    """Remove the files that killed pulls of other versions to the same folder left more than a day ago."""
    for folder in scratch.parent.glob(glob.escape(scratch.name[:-12]) + "*"):
        with contextlib.suppress(OSError):
            if is_hex(folder.name[-12:], 12) and max(_modification_times(folder)) < time.time() - ABANDONED:
                shutil.rmtree(folder, ignore_errors=True)


def _modification_times(folder: Path) -> list[float]:
    return [path.lstat().st_mtime for path in (folder, *folder.iterdir())]


def _assemble_folder(
    folder: Path, manifest: Manifest, scratch: Path, present_files: ExistingFolder | None, kept_paths: set[str]
) -> None:
    """Give the received files their names in `folder`, add the files that are kept, and check all as a push does."""
    received = [layer for layer in manifest.layers if layer.path not in kept_paths]
    last_paths = {layer.digest: layer.path for layer in received}
    for layer in manifest.layers:
        path = folder / layer.path
        path.parent.mkdir(parents=True, exist_ok=True)
        # Two paths may have the same content: the last one takes the received file, the others get copies.
        if present_files is not None and layer.path in kept_paths:
            present_files.link_or_copy(layer.path, path)
        elif last_paths[layer.digest] == layer.path:
            os.replace(_part_path(scratch, layer), path)
        else:
            shutil.copyfile(_part_path(scratch, layer), path)
    if present_files is not None:
        present_files.check_unchanged()
    listing(folder, strict=True)
    from adapterhub.manifest import derive, weight_facts  # need numpy

    # The manifest must be true of the files, as in a push; without one, it is derived from them.
    if manifest.adapter_json is not None:
        weight_facts.manifest_matching_weights(folder)
    else:
        files = {layer.path: (layer.digest, layer.size) for layer in manifest.layers}
        (folder / ADAPTER_JSON).write_bytes(derive.finalize(folder, files)[1])


@contextlib.contextmanager
def _errors_name(folder: Path, name: str) -> Iterator[None]:
    """Show `name` in errors for a temporary folder."""
    try:
        yield
    except AdapterhubError as error:
        error.rename(str(folder), name)
        raise

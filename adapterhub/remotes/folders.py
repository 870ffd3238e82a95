"""Folders of adapters: one as a source, and a new one to download a version into."""

from __future__ import annotations

import contextlib
import glob
import io
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adapterhub.digest import Digest, is_hex, sha256_bytes, sha256_file
from adapterhub.manifest import oci_manifest, present
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.manifest.package_files import check_names, listing
from adapterhub.manifest.present import Present
from adapterhub.ref import LATEST
from adapterhub.store.leases import ABANDONED
from adapterhub.store.store import local_errors, open_regular
from adapterhub.user_files import is_only_mine
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.containers import atomic
from adapterhub_converters.containers.inside import Inside
from adapterhub_converters.errors import AdapterhubError, LocalIOError, NotFoundError

from .download import PAUSES, received
from .parallel import JOBS, Move, Pace
from .protocol import Progress, Reader, Source

if TYPE_CHECKING:
    from adapterhub.manifest.describe import Draft

Ahead = Callable[[str, int, Source], Digest | None]


class AdapterFolder:
    """The adapter in a folder, as a push publishes it; nothing is written there.

    Args:
        folder: The adapter's own folder.
        where: Its name in errors.
        ahead: Takes a large file, by its name and size, before its digest is known, and returns the digest; None where it
            does not take it.
        draft: What was read of the folder already.
    """

    def __init__(self, folder: Path, where: str = "", ahead: Ahead | None = None, draft: Draft | None = None) -> None:
        from adapterhub.manifest import describe  # needs numpy, which a pull does without

        self.folder = folder
        self.where = where or str(folder)
        draft = draft or describe.draft(folder)  # before anything is sent: this may be no adapter at all
        self.skipped = draft.listing.skipped
        files = {path: _hashed(folder, path, ahead, draft.digests) for path in draft.listing.files}
        manifest, raw = draft.settle(files)
        self._made = oci_manifest.assemble({**files, ADAPTER_JSON: (sha256_bytes(raw), len(raw))}, manifest)
        self._bytes = {self._made.config.digest: self._made.config_bytes, sha256_bytes(raw): raw}
        self._paths = {layer.digest: folder / layer.path for layer in self._made.layers}

    def manifest(self, reference: str) -> Manifest:
        """The only manifest, by its digest or as `latest`."""
        if reference not in (LATEST, self._made.digest):
            raise NotFoundError(f"{self.where}: {reference}", "a folder has one version", "Remove the tag")
        return self._made

    @contextlib.contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        """The bytes of a file; those of the config and of adapter.json may exist in memory only."""
        made = self._bytes.get(blob.digest)
        if made is None and blob.digest not in self._paths:
            raise NotFoundError(self.where, f"no file with the digest {blob.digest}")
        file: Any = io.BytesIO(made) if made is not None else open_regular(self._paths[blob.digest])
        with file:
            file.seek(start)
            yield file

    def tags(self) -> list[str]:
        """None: a folder is one version."""
        return []

    def stop(self, *, on: bool = True) -> None:
        """Do nothing: files are read at once."""


LARGE = 32 << 20  # bytes; a file that takes long enough to hash to be sent in the meantime


class _File:
    """One file as a source of one blob, for any digest."""

    def __init__(self, path: Path) -> None:
        self._path, self.where = path, str(path.parent)

    def manifest(self, reference: str) -> Manifest:
        raise NotFoundError(self.where, f"has no {reference}")

    @contextlib.contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        with open_regular(self._path) as file:
            file.seek(start)
            yield cast(Reader, file)

    def tags(self) -> list[str]:
        return []

    def stop(self, *, on: bool = True) -> None:
        pass


def _hashed(folder: Path, path: str, ahead: Ahead | None, known: Mapping[Path, Digest]) -> tuple[Digest, int]:
    """The digest and the size of a file, which is sent meanwhile if somebody takes it."""
    with local_errors(folder / path):
        size = (folder / path).stat().st_size
    digest = known.get(folder / path)
    if digest is None and ahead and size >= LARGE:
        digest = ahead(path, size, _File(folder / path))
    return digest or sha256_file(folder / path), size


def download(
    source: Source,
    reference: Digest | str,
    out: Path,
    progress: Progress | None = None,
    *,
    replacing: Callable[[Present], object] | None = None,
    pauses: Sequence[float] = PAUSES,
    jobs: int = JOBS,
    pace: Pace | None = None,
    found: Callable[[], object] | None = None,
) -> Manifest:
    """Write the files of a version into the folder `out`: all of them, verified, or none.

    A run that was killed is resumed: the bytes it had received stay next to `out` until then. If the version has no
    adapter.json, as other tools make it, that file is derived as in a push. If `out` has these files already, `found` is
    called, and nothing is written.

    Args:
        source: It has the version.
        reference: Its tag or digest.
        out: Absent, empty, or what `replacing` admits.
        progress: Called with bytes received and bytes in all.
        replacing: Called with what is in `out`, before it is replaced, to raise OutputExistsError if it must not be. By
            default it has to be a version that `source` has.
        pauses: Seconds between attempts.
        jobs: Files to receive at a time.
        pace: Limits the rate.
        found: Called if nothing is to be done.

    Raises:
        OutputExistsError: `out` has something that would be lost.
    """
    there = present.look(out)
    made = source.manifest(reference)
    if there is not None:
        if there.holds(made):
            if found:
                found()
            return made
        if replacing is None:
            there.check_lost(lambda digest: has_version(source, digest))
        else:
            replacing(there)
        atomic.check_free(out, replace=True)
    check_names((layer.path for layer in made.layers), source.where)
    place = Path(os.path.abspath(out))
    waiting = place.parent / f".{place.name}.pull-{made.digest[7:19]}"
    kept = {layer.path for layer in made.layers if there is not None and there.has(layer)}
    layers = list({layer.digest: layer for layer in made.layers if layer.path not in kept}.values())
    move = Move(layers, progress, jobs, pace)
    watched = move.watched(source)

    def one(layer: Descriptor) -> None:
        with received(watched, layer, files, _part(waiting, layer), pauses=pauses):
            pass

    files = Inside(waiting)
    _make(waiting)
    try:
        move.each(one, layers, source)
    finally:
        with contextlib.suppress(OSError):
            waiting.rmdir()  # if it is empty
    try:
        with atomic.whole(out, replace=there is not None) as folder, _named(folder, source.where):
            _fill(folder, made, waiting, there, kept)
    finally:  # everything was received: another run would end the same way
        shutil.rmtree(waiting, ignore_errors=True)
        _sweep(waiting)
    return made


def has_version(source: Source, digest: Digest) -> bool:
    """Tell whether a version is there, by its digest."""
    try:
        return source.manifest(digest).digest == digest
    except NotFoundError:
        return False


def _part(waiting: Path, layer: Descriptor) -> Path:
    return waiting / f"{layer.digest[7:]}.part"


def _make(waiting: Path) -> None:
    """Create a folder of our own for incomplete files; refuse one that another user owns or can write to."""
    with local_errors(waiting):
        waiting.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            waiting.mkdir(mode=0o700)
        found = waiting.lstat()
    if not stat.S_ISDIR(found.st_mode) or not is_only_mine(found):
        what = "is not a folder, or others own it or can write to it"
        raise LocalIOError(str(waiting), what, "Remove it, or write to another folder")


def _sweep(waiting: Path) -> None:
    """Remove the files that killed pulls of other versions to the same folder left more than a day ago."""
    for old in waiting.parent.glob(glob.escape(waiting.name[:-12]) + "*"):
        with contextlib.suppress(OSError):
            if is_hex(old.name[-12:], 12) and max(_ages(old)) < time.time() - ABANDONED:
                shutil.rmtree(old, ignore_errors=True)


def _ages(folder: Path) -> list[float]:
    return [path.lstat().st_mtime for path in (folder, *folder.iterdir())]


def _fill(folder: Path, made: Manifest, waiting: Path, there: Present | None, kept: set[str]) -> None:
    """Give the received files their names in `folder`, add those of `there` that are kept, and check it as a push does."""
    received = [layer for layer in made.layers if layer.path not in kept]
    last = {layer.digest: layer.path for layer in received}
    for layer in made.layers:
        path = folder / layer.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if there is not None and layer.path in kept:
            there.keep(layer.path, path)
        elif last[layer.digest] == layer.path:
            os.replace(_part(waiting, layer), path)
        else:
            shutil.copyfile(_part(waiting, layer), path)
    if there is not None:
        there.check_unchanged()
    listing(folder, strict=True)
    from adapterhub.manifest import describe  # needs numpy

    if made.adapter_json is not None:
        describe.true_manifest(folder)
    else:
        files = {layer.path: (layer.digest, layer.size) for layer in made.layers}
        (folder / ADAPTER_JSON).write_bytes(describe.settle(folder, files)[1])


@contextlib.contextmanager
def _named(folder: Path, name: str) -> Iterator[None]:
    """Show `name` in errors for a temporary folder."""
    try:
        yield
    except AdapterhubError as error:
        error.where = error.where.replace(str(folder), name)
        raise

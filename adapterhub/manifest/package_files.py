"""The allow-list of files that may be packaged, and the check of paths before anything is written to them.

An allow-list, because scanners that look for bad files are evaded (19 of 22 ways to hide a pickle went unseen,
"Hide and Seek"): formats that cannot run code pass, pickles are refused by suffix and by their first bytes, links
and devices are refused, and every file that is skipped is named.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

from adapterhub_converters.adapter_files import HEAD, WEIGHT_SUFFIXES, is_pickle_name, starts_like_pickle
from adapterhub_converters.containers.open_file import open_regular
from adapterhub_converters.display import hides, printable
from adapterhub_converters.errors import FormatError, LocalIOError, NotFoundError, RefusedError

CONFIGS = {".json", ".toml", ".jinja", ".model", ".txt"}
DOCS = {".md", ".jsonl", ".png", ".svg"}
LEGAL = ("LICENSE", "LICENCE", "NOTICE", "COPYING")  # codespell:ignore
MAX_FILES = 10_000
# A registry may have been created in the adapter's own folder.
_OWN = {f"registry.db{old}{suffix}" for old in ("", ".old") for suffix in ("", "-wal", "-shm", "-journal")}

# No character that is special to Windows or a shell, and no control character.
_SPECIAL = frozenset('/\\:*?"<>|%\x7f') | {chr(code) for code in range(32)}
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}


@dataclass(frozen=True)
class Listing:
    """The files of an adapter and those that were skipped; relative paths with forward slashes, sorted."""

    files: tuple[str, ...]
    skipped: tuple[str, ...] = ()


def listing(folder: Path, *, head: Callable[[Path], bytes] | None = None) -> Listing:
    """The files of `folder` that belong to the adapter. Dotfiles are skipped.

    Args:
        folder: The adapter's own folder.
        head: Returns the first `HEAD` bytes of a file, where the caller opens the files anyway.

    Raises:
        RefusedError: A file must not be there at all, such as a pickle; the error names it.
    """
    files: list[str] = []
    skipped: list[str] = []
    refused: list[tuple[str, str, str]] = []
    for path, mode in _walk(folder, ""):
        if path.rpartition("/")[2].startswith(".") or path in _OWN:
            skipped.append(path)
        elif reason := _why_not(folder, path, mode, head or first_bytes):
            refused.append((path, *reason))
        else:
            files.append(path)
    if refused:
        path, what, hint = refused[0]
        more = f" (and {len(refused) - 1} more: {', '.join(item[0] for item in refused[1:4])})" if refused[1:] else ""
        raise RefusedError(f"{folder}/{path}", what + more, hint)
    if len(files) > MAX_FILES:
        raise RefusedError(
            str(folder), f"{len(files)} files are over the limit of {MAX_FILES}", "Push the adapter's own folder"
        )
    return Listing(tuple(check_paths(sorted(files), str(folder), RefusedError)), tuple(sorted(skipped)))


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
    """Relative path and mode of everything but folders; a dot-folder counts as one entry. Links are not followed."""
    try:
        entries = sorted(os.scandir(folder / prefix), key=lambda entry: entry.name)
        modes = [entry.stat(follow_symlinks=False).st_mode for entry in entries]
    except NotADirectoryError as error:
        raise NotFoundError(str(folder), "is a file", "Put it in a folder of its own and name that") from error
    except FileNotFoundError as error:
        raise NotFoundError(str(folder / prefix), "no such folder") from error
    except OSError as error:
        raise LocalIOError(str(folder / prefix), error.strerror or str(error)) from error
    for entry, mode in zip(entries, modes, strict=True):
        path = prefix + entry.name
        if stat.S_ISDIR(mode) and not entry.name.startswith("."):
            yield from _walk(folder, path + "/")
        else:
            yield path, mode


def _why_not(folder: Path, path: str, mode: int, head: Callable[[Path], bytes]) -> tuple[str, str] | None:
    """The reason why a file may not be part of an adapter, and the way to fix it; None if it may."""
    name = path.rpartition("/")[2]
    suffix = os.path.splitext(name)[1].lower()
    if not stat.S_ISREG(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "not a regular file"
        return f"{kind}: its target is not part of the adapter", "Replace it with the file itself"
    return _why_not_name(path) or _why_not_content(head(folder / path), suffix)


def _why_not_name(path: str) -> tuple[str, str] | None:
    name = path.rpartition("/")[2]
    suffix = os.path.splitext(name)[1].lower()
    if is_pickle_name(name):
        return "a pickle can run code when it is loaded", "Save weights as safetensors and leave the file out"
    if not is_packaged(name):
        allowed = " ".join(sorted(WEIGHT_SUFFIXES | CONFIGS | DOCS))
        return (
            f"files of type {suffix or name!r} are not packaged",
            f"Move it out of the folder; packaged are {allowed} and licenses",
        )
    return None


def is_packaged(name: str) -> bool:
    """True for a file name that may be part of an adapter, by its suffix or as a license text."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix in WEIGHT_SUFFIXES | CONFIGS | DOCS or name.upper().startswith(LEGAL)


def check_names(paths: Iterable[str], where: str) -> None:
    """Raise RefusedError for the first name that no file of an adapter may have, before remote files are fetched."""
    for path in paths:
        if reason := _why_not_name(path):
            raise RefusedError(f"{where}: {path[:120]}", reason[0])


def check_file(path: str, head: bytes, where: str) -> None:
    """Raise RefusedError if a remote file with these first `HEAD` bytes may not be part of an adapter."""
    check_names([path], where)
    if reason := _why_not_content(head, os.path.splitext(path)[1].lower()):
        raise RefusedError(f"{where}: {path[:120]}", reason[0])


def _why_not_content(head: bytes, suffix: str) -> tuple[str, str] | None:
    hint = "Save weights as safetensors and leave the file out"
    if suffix == ".safetensors":
        # Its length field may begin like a pickle, so the byte after the field decides.
        return None if head[8:9] == b"{" else ("not a safetensors file, in spite of its name", hint)
    if suffix == ".gguf":
        return None if head.startswith(b"GGUF") else ("not a GGUF file, in spite of its name", hint)
    if starts_like_pickle(head):
        return "a pickle or an archive, in spite of its name; it can run code when it is loaded", hint
    return None


def first_bytes(path: Path) -> bytes:
    """The first `HEAD` bytes of a file."""
    try:
        with open_regular(path) as file:
            return file.read(HEAD)
    except OSError as error:
        raise LocalIOError(str(path), error.strerror or str(error)) from error


def check_paths(paths: Iterable[str], where: str, error: type[FormatError] | type[RefusedError] = FormatError) -> Iterable[str]:
    """Return `paths` if each can be written below a folder on any system and no two collide, else raise `error`.

    No absolute path, `..`, backslash, drive letter, `%`, dotfile or device name; no character without a shape, such as those
    that turn the direction of text, by which one name looks like another; no two paths that differ only in case or
    in the normalization of accents, which macOS and Windows would write to one file; no file with the path of a folder.
    """
    result = list(paths)
    seen: dict[str, tuple[str, bool]] = {}
    for path in result:
        parts = path.split("/")
        if len(path) > 1024 or not all(map(_safe, parts)):
            raise error(where, f"file name '{printable(path[:120])}' cannot be written safely everywhere", "Rename the file")
        if hides(path):
            what = f"file name '{printable(path[:120])}' has characters that nobody sees"
            raise error(where, what, "Rename the file")
        for depth in range(1, len(parts) + 1):
            prefix, is_file = "/".join(parts[:depth]), depth == len(parts)
            key = normalize("NFD", normalize("NFD", prefix).casefold())
            if (is_file and key in seen) or seen.setdefault(key, (prefix, is_file)) != (prefix, is_file):
                raise error(where, f"file name {path[:120]!r} collides with {seen[key][0][:120]!r}", "Rename one of them")
    return result


def _safe(part: str) -> bool:
    return (
        0 < len(part) <= 255
        and _SPECIAL.isdisjoint(part)
        and part[0] not in ". "
        and part[-1] not in ". "
        and part.partition(".")[0].lower() not in _DEVICES
    )

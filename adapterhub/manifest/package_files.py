"""Which files of a folder are the adapter, and which paths may ever be written.

An allow-list, because scanners that look for bad files are evaded (19 of 22 ways to hide a pickle went unseen,
"Hide and Seek"): formats that cannot run code pass, pickles are refused by extension and by their first bytes, links
and devices are refused, and whatever is left out is named.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

from adapterhub_converters.errors import FormatError, LocalIOError, NotFoundError, RefusedError, UsageError

WEIGHTS = {".safetensors", ".gguf"}
CONFIGS = {".json", ".toml", ".jinja", ".model", ".txt"}
DOCS = {".md", ".jsonl", ".png", ".svg"}
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
LEGAL = ("LICENSE", "LICENCE", "NOTICE", "COPYING")
MAX_FILES = 10_000
HEAD = 16  # bytes of a file that say what it is
# A registry may have been made in the adapter's own folder.
_OWN = {f"registry.db{old}{suffix}" for old in ("", ".old") for suffix in ("", "-wal", "-shm", "-journal")}

# What Windows or a shell would take for something else, and control characters.
_COMPONENT = re.compile(r'[^\x00-\x1f\x7f/\\:*?"<>|%]{1,255}')
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Listing:
    """The files of an adapter, relative with forward slashes and sorted, and what of the folder is not one of them."""

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
    """Relative path and mode of everything but folders; a dot-folder counts as one thing. Links aren't followed."""
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
    """Why a file may not be part of an adapter, and what to do about it; None if it may."""
    name = path.rpartition("/")[2]
    suffix = os.path.splitext(name)[1].lower()
    if not stat.S_ISREG(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "not a regular file"
        return f"{kind}: what it points to is not the adapter's own", "Put the file itself there"
    return _why_not_name(path) or _why_not_content(head(folder / path), suffix)


def _why_not_name(path: str) -> tuple[str, str] | None:
    name = path.rpartition("/")[2]
    suffix = os.path.splitext(name)[1].lower()
    if suffix in PICKLES:
        return "a pickle can run code when it is loaded", "Save weights as safetensors and leave the file out"
    if not (suffix in WEIGHTS | CONFIGS | DOCS or name.upper().startswith(LEGAL)):
        allowed = " ".join(sorted(WEIGHTS | CONFIGS | DOCS))
        return (
            f"files of type {suffix or name!r} are not packaged",
            f"Move it out of the folder; packaged are {allowed} and licenses",
        )
    return None


def check_names(paths: Iterable[str], where: str) -> None:
    """RefusedError for the first of the names of files elsewhere that no adapter's file has, before any of them is fetched."""
    for path in paths:
        if reason := _why_not_name(path):
            raise RefusedError(f"{where}: {path[:120]}", reason[0])


def check_file(path: str, head: bytes, where: str) -> None:
    """RefusedError where a file elsewhere, of which the first `HEAD` bytes are at hand, is none that an adapter has."""
    check_names([path], where)
    if reason := _why_not_content(head, os.path.splitext(path)[1].lower()):
        raise RefusedError(f"{where}: {path[:120]}", reason[0])


def _why_not_content(head: bytes, suffix: str) -> tuple[str, str] | None:
    hint = "Save weights as safetensors and leave the file out"
    if suffix == ".safetensors":
        # Its length field may begin like a pickle, so the byte after the field decides.
        return None if head[8:9] == b"{" else ("not a safetensors file, whatever its name says", hint)
    if suffix == ".gguf":
        return None if head.startswith(b"GGUF") else ("not a GGUF file, whatever its name says", hint)
    if head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"):
        return "a pickle or an archive, whatever its name says; it can run code when it is loaded", hint
    return None


def first_bytes(path: Path) -> bytes:
    """The first `HEAD` bytes of a file."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(HEAD)
    except OSError as error:
        raise LocalIOError(str(path), error.strerror or str(error)) from error


def check_paths(paths: Iterable[str], where: str, error: type[FormatError] | type[RefusedError] = FormatError) -> Iterable[str]:
    """`paths` again if each may be written below a folder on any system and none gets in another's way, else `error`.

    No absolute path, `..`, backslash, drive letter, NUL, `%`, dotfile or device name; no two that differ only in case or in how
    an accent is written, as macOS and Windows would write them to one file; no file that is another's folder.
    """
    result = list(paths)
    seen: dict[str, tuple[str, bool]] = {}
    for path in result:
        parts = path.split("/")
        if len(path) > 1024 or not all(map(_safe, parts)):
            raise error(where, f"file name {path[:120]!r} cannot be written safely everywhere", "Rename the file")
        for depth in range(1, len(parts) + 1):
            prefix, is_file = "/".join(parts[:depth]), depth == len(parts)
            key = normalize("NFD", normalize("NFD", prefix).casefold())
            if (is_file and key in seen) or seen.setdefault(key, (prefix, is_file)) != (prefix, is_file):
                raise error(where, f"file name {path[:120]!r} collides with {seen[key][0][:120]!r}", "Rename one of them")
    return result


def _safe(part: str) -> bool:
    return bool(_COMPONENT.fullmatch(part)) and part[0] not in ". " and part[-1] not in ". " and not _DEVICES.fullmatch(part)


def adapter_in(path: Path) -> Path:
    """The adapter in a folder: the folder itself, or the one GGUF file it has; UsageError when it has several."""
    found = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if not found or (path / "adapter_config.json").exists():
        return path
    if len(found) > 1:
        raise UsageError(str(path), f"{len(found)} GGUF files are in it", f"Name one, like {found[0]}")
    return found[0]

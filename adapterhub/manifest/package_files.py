"""The allow-list of files that may be packaged, and the check of paths before anything is written to them.

It is an allow-list because scanners that look for bad files are evaded (19 of 22 ways to hide a pickle went unseen, "Hide and
Seek"): formats that cannot run code pass, and every file that is left out is named. A trainer leaves more in a folder than the
adapter: checkpoints, optimizer states, scripts, logs. Those are left out. A file that may be meant as part of the adapter but
cannot be packaged is refused: pickled weights, links and devices, and files whose contents contradict their names.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from unicodedata import normalize

from adapterhub_converters.adapter_files import (
    HEAD_SIZE,
    LITGPT_WEIGHTS,
    WEIGHT_SUFFIXES,
    determines_function,
    is_pickle_name,
    is_weights,
    pickled_weights,
    starts_like_pickle,
)
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.open_file import MAX_PATH, open_regular, walk
from adapterhub_converters.display import has_invisible, printable
from adapterhub_converters.errors import FormatError, LocalIOError, NotFoundError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

CONFIGS = {".json", ".toml", ".jinja", ".model", ".txt"}
# The configs of axolotl, LLaMA-Factory and trl are YAML: they tell how an adapter was trained, and no runtime reads them.
DOCS = {".md", ".jsonl", ".png", ".svg", ".yaml", ".yml"}
LEGAL = ("LICENSE", "LICENCE", "NOTICE", "COPYING")  # codespell:ignore
MAX_FILES = 10_000
_MAX_DEPTH = 32  # parts of a path: each of its folders is compared with all others, and may be 1 kB of text
IGNORE_FILE = ".adapterhubignore"
TRAINER_STATE = "trainer_state.json"
"""The log of transformers' Trainer, by which a training with it is recorded."""
SIGNATURE = "model.sig"
"""The signature of the files in a folder; no version contains it, as it is about the version."""
_MAX_IGNORE = 64 << 10  # bytes of an ignore file
# Every pattern is tried on every file, and at each bracket fnmatch scans for its end up to the end of the pattern.
MAX_PATTERNS, MAX_PATTERN = 256, 256  # of a project's, and characters of one
_CHECKPOINT = "checkpoint-"  # transformers' Trainer
# A registry may have been created in the adapter's own folder.
_REGISTRY_FILES = {f"registry.db{old}{suffix}" for old in ("", ".old") for suffix in ("", "-wal", "-shm", "-journal")}

# No character that is special to Windows or a shell, and no control character.
_SPECIAL = frozenset('/\\:*?"<>|%\x7f') | {chr(code) for code in range(32)}
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}


@dataclass(frozen=True)
class Listing:
    """The files of an adapter and those that were skipped; relative paths with forward slashes, sorted."""

    files: tuple[str, ...]
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Selection:
    """The files of a folder to package, by patterns (`fnmatch`) of paths, or of names if a pattern has no slash.

    Attributes:
        include: Only files that match one of these; all files if empty. The weights and the config are always included.
        exclude: No files that match one of these, which adds to the `.adapterhubignore` in the folder.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def takes(self, path: str) -> bool:
        """Return True if the patterns allow a file to be packaged."""
        if _matches(path, self.exclude):
            return False
        return not self.include or determines_function(path) or _matches(path, self.include)


def _matches(path: str, patterns: Iterable[str]) -> bool:
    """Return True if a pattern matches a path, its name, or a folder that it is in."""
    parts = path.split("/")
    folders = ["/".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    for pattern in patterns:
        bare = pattern.strip("/")
        subjects = folders if "/" in bare else parts
        if any(fnmatchcase(part, bare) for part in (subjects[:-1] if pattern.endswith("/") else subjects)):
            return True
    return False


def listing(
    folder: Path,
    *,
    head: Callable[[Path], bytes] | None = None,
    selection: Selection | None = None,
    strict: bool = False,
) -> Listing:
    """Return the files of `folder` that belong to the adapter, and those left out: dotfiles, checkpoints, other types of files.

    Args:
        folder: The adapter's own folder.
        head: Returns the first `HEAD` bytes of a file, for a caller that opens the files anyway.
        selection: Patterns of files to package and to leave out.
        strict: Leave out dotfiles only, and refuse every other file that cannot be packaged, as in a version from somebody
            else.

    Raises:
        RefusedError: A file that may be meant as part of the adapter cannot be packaged; the error names it.
    """
    files, skipped, refused = survey(folder, selection, strict=strict)
    for path in list(files):
        if reason := content_refusal((head or first_bytes)(folder / path), os.path.splitext(path)[1].lower()):
            refused.append((path, *reason))
    if refused:
        path, problem, hint = refused[0]
        suffix = f" (and {len(refused) - 1} more: {', '.join(item[0] for item in refused[1:4])})" if refused[1:] else ""
        raise RefusedError(f"{folder}/{path}", problem + suffix, hint)
    if len(files) > MAX_FILES:
        raise RefusedError(
            str(folder), f"{len(files)} files are over the limit of {MAX_FILES}", "Push the adapter's own folder"
        )
    return Listing(tuple(check_paths(sorted(files), str(folder), RefusedError)), tuple(sorted(skipped)))


def shorten_names(names: Sequence[str], limit: int = 6, *, unlisted: int = 0) -> str:
    """Return the first `limit` names as text, with the number of the others; `unlisted` counts others not in `names`."""
    remaining = max(len(names) - limit, 0) + unlisted
    return ", ".join(names[:limit]) + (f" and {remaining} more" if remaining else "")


def survey(
    folder: Path, selection: Selection | None = None, *, strict: bool = False
) -> tuple[list[str], list[str], list[tuple[str, str, str]]]:
    """Divide the files of `folder`, by names and kinds, as `listing` does: to package, left out, and refused.

    The signature is in none of the lists. A refused file comes with the reason and the way to fix it. No file of the adapter is
    opened.
    """
    chosen = selection or Selection()
    ignored = Selection(exclude=_ignore_patterns(folder))
    files: list[str] = []
    skipped: list[str] = []
    refused: list[tuple[str, str, str]] = []
    entries = sorted(_walk(folder, strict=strict))
    has_weights = any(is_weights(path) for path, _ in entries)
    for path, mode in entries:
        name = path.rpartition("/")[2]
        # A version cannot contain the signature of itself.
        if path == SIGNATURE and stat.S_ISREG(mode):
            continue
        if name.startswith(".") or path in _REGISTRY_FILES or not (chosen.takes(path) and ignored.takes(path)):
            skipped.append(path)
        elif len(path) > MAX_PATH:
            refused.append((printable(path[:120]), f"a path of more than {MAX_PATH} characters", "Move it out of the folder"))
        elif stat.S_ISDIR(mode):
            skipped.append(f"{path}/")
        elif not strict and stat.S_ISREG(mode) and _is_left_out(path, has_weights=has_weights):
            skipped.append(path)
        elif reason := refusal(path, mode):
            refused.append((path, *reason))
        else:
            files.append(path)
    return files, skipped, refused


def _ignore_patterns(folder: Path) -> tuple[str, ...]:
    """Return the patterns of an ignore file: one per line; empty lines and lines that begin with # are comments."""
    try:
        text = json_file.read_text(folder / IGNORE_FILE, _MAX_IGNORE, follow=False)
    except NotFoundError:
        return ()
    lines = (line.strip() for line in text.splitlines())
    patterns = tuple(line for line in lines if line and not line.startswith("#"))
    if len(patterns) > MAX_PATTERNS or any(len(pattern) > MAX_PATTERN for pattern in patterns):
        problem = f"more than {MAX_PATTERNS} patterns, or one of more than {MAX_PATTERN} characters"
        raise FormatError(f"{folder}/{IGNORE_FILE}", problem, "Write one pattern for many files, such as logs/ or *.json")
    return patterns


def _is_left_out(path: str, *, has_weights: bool) -> bool:
    """Return True for a file that no adapter needs. A pickle is one only next to weights in another format."""
    name = path.rpartition("/")[2]
    if is_pickle_name(name):
        return has_weights and not pickled_weights([name]) and name != LITGPT_WEIGHTS
    return not is_packaged(name)


def _walk(folder: Path, *, strict: bool) -> Iterator[tuple[str, int]]:
    """Yield the relative path and the mode of everything but folders.

    A dot-folder counts as one entry; so does a folder whose path is too long and, unless `strict`, the folder of a checkpoint.
    """

    def should_enter(path: str) -> bool:
        name = path.rpartition("/")[2]
        checkpoint = not strict and name.startswith(_CHECKPOINT) and name[len(_CHECKPOINT) :].isdecimal()
        return not name.startswith(".") and not checkpoint and len(path) <= MAX_PATH

    try:
        for path, status in walk(folder, should_enter):
            if not stat.S_ISDIR(status.st_mode) or not should_enter(path):
                yield path, status.st_mode
    except NotADirectoryError as error:
        raise NotFoundError(str(folder), "is a file", "Put it in a folder of its own and name that") from error
    except FileNotFoundError as error:
        raise NotFoundError(str(folder), "no such folder", code="no-such-file") from error
    except OSError as error:
        raise LocalIOError(str(error.filename or folder), error.strerror or str(error)) from error


def refusal(path: str, mode: int) -> tuple[str, str] | None:
    """Return why a file's name and mode exclude it from an adapter, and the way to fix it; None if they do not."""
    if not stat.S_ISREG(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "not a regular file"
        return f"{kind}: its target is not part of the adapter", "Replace it with the file itself"
    return _name_refusal(path)


def _name_refusal(path: str) -> tuple[str, str] | None:
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
    """Return True if a file with this name may be part of an adapter, by its suffix or as a license text."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix in WEIGHT_SUFFIXES | CONFIGS | DOCS or name.upper().startswith(LEGAL)


def divide_names(paths: Iterable[str]) -> tuple[list[str], list[str]]:
    """Divide the names of files that somebody else sends as `survey` divides a folder's: to package, and left out.

    A name that is neither, such as that of pickled weights, is in the first list, for `check_names` to refuse.
    """
    sorted_paths = sorted(paths)
    has_weights = any(map(is_weights, sorted_paths))
    left_out = {
        path
        for path in sorted_paths
        if _is_hidden(path) or path in _REGISTRY_FILES or _is_left_out(path, has_weights=has_weights)
    }
    return [path for path in sorted_paths if path not in left_out], [path for path in sorted_paths if path in left_out]


def _is_hidden(path: str) -> bool:
    """Return True for a dotfile, and for a file in a folder that is left out as a whole."""
    *parents, name = path.split("/")
    checkpoint = any(part.startswith(_CHECKPOINT) and part[len(_CHECKPOINT) :].isdecimal() for part in parents)
    return checkpoint or any(part.startswith(".") and part not in (".", "..") for part in (*parents, name))


def check_names(paths: Iterable[str], location: str) -> None:
    """Raise RefusedError for the first name that no file of an adapter may have, before remote files are fetched."""
    for path in paths:
        if reason := _name_refusal(path):
            raise RefusedError(f"{location}: {path[:120]}", reason[0])


def check_file(path: str, head: bytes, location: str) -> None:
    """Raise RefusedError if a remote file with these first `HEAD` bytes may not be part of an adapter."""
    check_names([path], location)
    if reason := content_refusal(head, os.path.splitext(path)[1].lower()):
        raise RefusedError(f"{location}: {path[:120]}", reason[0])


def content_refusal(head: bytes, suffix: str) -> tuple[str, str] | None:
    """Return why a file with these first `HEAD` bytes may not have that suffix, and the way to fix it; None if it may."""
    hint = "Save weights as safetensors and leave the file out"
    if suffix == ".safetensors":
        # The header's length comes first and may happen to look like a pickle, so the byte after it decides.
        return None if head[8:9] == b"{" else ("named like a safetensors file, but is not one", hint)
    if suffix == ".gguf":
        return None if head.startswith(b"GGUF") else ("named like a GGUF file, but is not one", hint)
    if starts_like_pickle(head):
        return "a pickle or an archive under another name; it can run code when it is loaded", hint
    return None


def first_bytes(path: Path) -> bytes:
    """Return the first `HEAD` bytes of a file."""
    try:
        with open_regular(path) as file:
            return file.read(HEAD_SIZE)
    except OSError as error:
        raise LocalIOError(str(path), error.strerror or str(error)) from error


def check_paths(
    paths: Iterable[str], location: str, error: type[FormatError] | type[RefusedError] = FormatError
) -> Iterable[str]:
    """Return `paths` if each can be written below a folder on any system and no two collide, else raise `error`.

    Not allowed are: absolute paths, `..`, backslashes, drive letters, `%`, dotfiles and device names; paths of more than 32
    parts; characters without a shape, such as those that turn the direction of text, which make one name look like another; two
    paths that differ only in case or in the normalization of accents, which macOS and Windows would write to one file; and a
    file with the path of a folder.
    """
    result = list(paths)
    entry_by_key: dict[str, tuple[str, bool]] = {}
    for path in result:
        parts = path.split("/")
        if len(path) > MAX_PATH or not all(map(_is_safe_name, parts)):
            raise error(location, f"file name '{printable(path[:120])}' cannot be written safely everywhere", "Rename the file")
        if len(parts) > _MAX_DEPTH:
            raise error(location, f"file name '{printable(path[:120])}' has more than {_MAX_DEPTH} parts", "Move the file up")
        if has_invisible(path):
            problem = f"file name '{printable(path[:120])}' has invisible characters"
            raise error(location, problem, "Rename the file")
        for depth in range(1, len(parts) + 1):
            prefix, is_file = "/".join(parts[:depth]), depth == len(parts)
            # Canonical caseless matching (The Unicode Standard, D145): case folding may undo a normalization, hence two.
            key = normalize("NFD", normalize("NFD", prefix).casefold())
            # One file twice, two spellings of one name, or a file where another path has a folder.
            if (is_file and key in entry_by_key) or entry_by_key.setdefault(key, (prefix, is_file)) != (prefix, is_file):
                raise error(
                    location, f"file name {path[:120]!r} collides with {entry_by_key[key][0][:120]!r}", "Rename one of them"
                )
    return result


def _is_safe_name(part: str) -> bool:
    # Windows drops dots and spaces at the end of a name, and reserves device names whatever suffix follows.
    return (
        0 < len(part) <= 255
        and _SPECIAL.isdisjoint(part)
        and part[0] not in ". "
        and part[-1] not in ". "
        and part.partition(".")[0].lower() not in _DEVICES
    )

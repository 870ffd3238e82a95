"""Scan the files of an adapter for anything that could run code or mislead, without running or loading any of it.

The list of what may be packaged comes first (`manifest.package_files`), as in a push: a file of another type is reported
whatever it contains. Then each file is read as programs read it that ignore its name: as a pickle, an archive, a program, a
page. A scan finds patterns; finding none proves nothing about what an adapter makes a model write.

    scanned_file.py      a file, read by offset
    pickle_opcodes.py    opcodes, not executed
    archives.py          archives and programs by structure, anywhere in a file
    weight_files.py      safetensors, GGUF and PNG as containers
    configs.py           keys that import code
    templates.py         chat templates, token by token
    markup.py            script in cards and headers
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from adapterhub.checks.report import SEVERITIES, Findings, Problem, Report
from adapterhub.manifest.package_files import MAX_FILES, SIGNATURE, check_paths, content_refusal, is_packaged, refusal
from adapterhub_converters.adapter_files import ADAPTER_JSON, HEAD_SIZE, WEIGHT_SUFFIXES, is_pickle_name
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.confined_files import ConfinedFiles
from adapterhub_converters.containers.open_file import MAX_PATH, open_regular, walk
from adapterhub_converters.errors import AdapterhubError, FormatError, LocalIOError, NotFoundError, RefusedError

from . import archives, configs, markup, pickle_opcodes, templates, weight_files
from .scanned_file import ScannedFile, wrap_file

_MAX_TEXT = 64 << 20  # bytes of a text; the largest tokenizer.json known has 35 MB
_START = 4096  # bytes in which a file shows what it is
# Vocabularies: they have no key that runs anything, any characters, and more texts than the reader of configs takes.
_VOCABULARIES = {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json"}
_PAGES = ("<!doctype html", "<html", "<script", "<svg", "<?php", "%pdf-")
_NOT_ENTERED = ".git"
# A repository's own files, which no version has.
_OF_REPOSITORY = {".gitattributes", ".gitignore", ".adapterhubignore", SIGNATURE}


def scan(path: Path, *, display_name: str = "", limit: int | None = None) -> Report:
    """Scan a folder, or one file.

    Args:
        path: The folder or file; it need not be an adapter.
        display_name: Its name in the report; its path if empty.
        limit: How many problems of each code the report has, besides their number; all of them if None.

    Returns:
        A report of the level `scan`, whose facts are the numbers of `files` and `bytes`.

    Raises:
        NotFoundError: The path does not exist.
        RefusedError: The folder has more files than any adapter.
    """
    try:
        return report(_files(path), display_name or str(path), limit)
    except FileNotFoundError as error:
        raise NotFoundError(display_name or str(path), "no such file or folder", code="no-such-file") from error
    except OSError as error:
        raise LocalIOError(str(error.filename or path), error.strerror or str(error)) from error


def report(files: Iterable[tuple[int, Iterator[Problem]]], display_name: str, limit: int | None = None) -> Report:
    """Return the report on files, each given by its size and its problems; arguments and result are those of `scan`."""
    findings, facts = Findings(limit), {"files": 0, "bytes": 0}
    for size, of_file in files:
        findings.add(of_file)
        facts["files"] += 1
        facts["bytes"] += size
    all_problems = [problem for same_code in findings.by_code.values() for problem in same_code]
    all_problems.sort(key=lambda problem: SEVERITIES.index(problem.severity))
    return Report(display_name, None, None, tuple(all_problems), facts=facts, levels=("scan",), counts=dict(findings.counts))


def _files(path: Path) -> Iterator[tuple[int, Iterator[Problem]]]:
    """Yield the size and the problems of each file, which is open meanwhile."""
    if not path.is_dir():
        with open_regular(path) as file:
            scan_file = wrap_file(file, path.name)
            yield scan_file.size, problems(scan_file)
        return
    inside = ConfinedFiles(path.resolve())
    for count, (name, status) in enumerate(walk(path, lambda name: os.path.basename(name) != _NOT_ENTERED)):
        if count >= MAX_FILES:
            raise RefusedError(str(path), f"more than {MAX_FILES} files", "Scan the adapter's own folder")
        if stat.S_ISDIR(status.st_mode):
            if os.path.basename(name) == _NOT_ENTERED or len(name) > MAX_PATH:
                yield 0, iter([Problem("not-scanned", name[:120], "", "a folder that is not part of an adapter")])
        elif not stat.S_ISREG(status.st_mode):
            message, hint = refusal(name, status.st_mode) or ("", "")
            yield 0, iter([Problem("not-packaged", name, "", message, hint)])
        else:
            with inside.open(inside.root / name) as file:
                scan_file = wrap_file(file, name)
                yield scan_file.size, problems(scan_file)


def problems(file: ScannedFile) -> Iterator[Problem]:
    """Yield the problems of one file."""
    if file.path not in _OF_REPOSITORY:
        yield from _name_problems(file.path)
    head = file.read_at(0, _START)
    # Whatever the suffix: loaders of pickles go by the contents.
    pickle = pickle_opcodes.find(file.read_at(0, pickle_opcodes.MAX_BYTES))
    # Weights of a known suffix are parsed below; by chance they may begin like an archive.
    archive = archives.archive_at_start(file, head) if file.suffix not in WEIGHT_SUFFIXES else None
    program = archives.program_at_start(head)
    pickle = pickle or (archive.pickle if archive else None)
    if pickle or is_pickle_name(file.path):
        message = str(pickle) if pickle else "named like a pickle, which other programs load as one"
        yield Problem("pickle", file.path, "", message, "Save weights as safetensors and leave the file out")
    if archive:
        yield Problem("archive", file.path, "", f"{archive.kind}, whatever its name is")
    if program or file.suffix in archives.CODE_SUFFIXES:
        yield Problem("program", file.path, "", f"a program: {program or file.suffix}")
    if file.suffix in WEIGHT_SUFFIXES and (reason := content_refusal(head[:HEAD_SIZE], file.suffix)):
        yield Problem("disguised", file.path, "", *reason)
    elif file.suffix in _BINARY:
        yield from _BINARY[file.suffix](file)
        yield from weight_files.polyglot(file)
    elif not (pickle or archive or program):
        yield from _text_problems(file)


def _name_problems(path: str) -> Iterator[Problem]:
    """Yield what a push refuses or leaves out by the name alone."""
    try:
        check_paths([part for part in [path] if not os.path.basename(part).startswith(".")], "")
    except AdapterhubError as error:
        yield Problem("not-packaged", path[:MAX_PATH], "", error.what, error.hint)
    if not is_packaged(os.path.basename(path)) and not is_pickle_name(path):
        yield Problem("left-out", path, "", "not of a type that a push packages")


def _no_problems(_file: ScannedFile) -> Iterator[Problem]:
    return iter(())


_BINARY: Mapping[str, Callable[[ScannedFile], Iterator[Problem]]] = {
    ".safetensors": weight_files.safetensors, ".gguf": weight_files.gguf, ".png": weight_files.png, ".model": _no_problems,
}  # fmt: skip


def _text_problems(file: ScannedFile) -> Iterator[Problem]:
    """Yield the problems of a file that should be a text."""
    if file.size > _MAX_TEXT:
        yield Problem("not-scanned", file.path, "", f"a text of more than {_MAX_TEXT >> 20} MiB")
        yield from weight_files.polyglot(file)
        return
    text = _decode(file.read_at(0, _MAX_TEXT))
    if text is None:
        listed = is_packaged(os.path.basename(file.path))
        message = "named like a text, but is not UTF-8 text" if listed else "bytes of no type that an adapter needs"
        yield Problem("disguised" if listed else "unknown-binary", file.path, "", message)
        yield from weight_files.polyglot(file)
        return
    yield from _page_problems(file, text)
    if file.suffix == ".jinja":
        yield from templates.problems(file.path, "", text)
    elif os.path.basename(file.path) not in _VOCABULARIES:
        yield from _json_problems(file.path, text) if file.suffix == ".json" else markup.invisible_characters(file.path, text)


def _decode(raw: bytes) -> str | None:
    """Return bytes as text; None if they are not UTF-8 text."""
    try:
        return None if b"\0" in raw else raw.decode()
    except UnicodeDecodeError:
        return None


def _page_problems(file: ScannedFile, text: str) -> Iterator[Problem]:
    """Yield the effects of a text in a program that shows it as a page."""
    if archives.zip_in(file):
        yield Problem("polyglot", file.path, "", "a zip archive as well")
    is_page = file.suffix in (".svg", ".html", ".htm")
    if not is_page and text.lstrip()[:16].lower().startswith(_PAGES):
        yield Problem("polyglot", file.path, "", "begins like a page, which a browser shows as one")
    if is_page or file.suffix == ".md" or os.path.basename(file.path) == ADAPTER_JSON:
        for message in markup.active_content(markup.without_code(text) if file.suffix == ".md" else text):
            yield Problem("active-markup", file.path, "", f"has {message}")


def _json_problems(path: str, text: str) -> Iterator[Problem]:
    """Yield the problems of a JSON document: keys that run code, and chat templates in it."""
    try:
        document = json_file.parse(text, path)
    except FormatError as error:
        yield Problem("malformed", path, "", error.what)
        return
    if os.path.basename(path) == ADAPTER_JSON:
        yield from markup.invisible_characters(path, text)
    for fault in configs.faults(document):
        yield Problem(fault.code, path, fault.key, fault.message)
    for key, template in _templates(document):
        yield from templates.problems(path, key, template)


def _templates(document: Any) -> Iterator[tuple[str, str]]:
    """Yield the chat templates of a tokenizer's or processor's config: one, a list with names, or an object of them."""
    templates = document.get("chat_template") if isinstance(document, dict) else None
    if isinstance(templates, str):
        yield "chat_template", templates
    elif isinstance(templates, dict):
        yield from ((f"chat_template.{key}", text) for key, text in templates.items() if isinstance(text, str))
    elif isinstance(templates, list):
        for template in templates:
            if isinstance(template, dict) and isinstance(text := template.get("template"), str):
                yield f"chat_template.{template.get('name')}", text

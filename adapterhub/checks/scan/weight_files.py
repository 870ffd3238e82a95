"""Files of weights and pictures as containers: bytes after their end, between their parts, and texts in their headers."""

from __future__ import annotations

from collections.abc import Iterator

from adapterhub.checks.report import Problem
from adapterhub_converters.containers import gguf_file, safetensors_header
from adapterhub_converters.errors import FormatError
from adapterhub_converters.trained_prompt import GGUF_KEY

from . import archives, markup, templates
from .scanned_file import ScannedFile

_PNG = b"\x89PNG\r\n\x1a\n"
_MAX_CHUNKS = 100_000
_MAX_TEXT = 16 << 20  # characters of a header
_TEMPLATES = ("tokenizer.chat_template", GGUF_KEY)  # and keys that begin with these
_CODES = {"trailing": "trailing-data", "hole": "hidden-data"}


def safetensors(file: ScannedFile) -> Iterator[Problem]:
    """Yield the problems of a safetensors file; its reader refuses holes, overlaps and bytes after the last tensor."""
    try:
        header = safetensors_header.read_header(file.read_at, file.size, file.path)
    except FormatError as error:
        yield Problem(_CODES.get(error.code, "malformed"), file.path, "", error.what)
        length = int.from_bytes(file.read_at(0, 8), "little")
        yield from _text_problems(file, file.read_at(8, min(length, _MAX_TEXT)).decode("utf-8", "replace"))
        return
    yield from _text_problems(file, "\n".join([*header.metadata, *header.metadata.values()])[:_MAX_TEXT])
    yield from _text_problems(file, "\n".join(name for name in header.names if "<" in name)[:_MAX_TEXT])


def gguf(file: ScannedFile) -> Iterator[Problem]:
    """Yield the problems of a GGUF file, whose readers skip bytes between tensors and after the last one."""
    try:
        header = gguf_file.read_header(file.read_at, file.size, file.path)
    except FormatError as error:
        yield Problem("malformed", file.path, "", error.what)
        return
    position = header.data_start
    for info in sorted(header.tensors.values(), key=lambda info: info.offset):
        if _is_foreign(file, position, info.offset, header.alignment):
            yield Problem("hidden-data", file.path, info.name, f"{info.offset - position} bytes before it belong to no tensor")
        # Tensors may overlap: go by the furthest end.
        position = max(position, info.offset + info.size)
    if _is_foreign(file, position, file.size, header.alignment):
        yield Problem("trailing-data", file.path, "", f"{file.size - position} bytes follow the last tensor")
    for key, value in header.metadata.items():
        if header.kinds[key] == "STRING" and key.startswith(_TEMPLATES):
            yield from templates.problems(file.path, key, value)
        elif header.kinds[key] == "STRING":
            yield from _text_problems(file, value[:_MAX_TEXT], key)


def _is_foreign(file: ScannedFile, begin: int, end: int, alignment: int) -> bool:
    """Return whether there is more between two positions than zeros for the alignment."""
    return end > begin and (end - begin >= alignment or file.read_at(begin, end - begin).strip(b"\0") != b"")


def png(file: ScannedFile) -> Iterator[Problem]:
    """Yield the problems of a PNG: its chunks end with IEND, and the file with them."""
    at = len(_PNG)
    if file.read_at(0, at) != _PNG:
        yield Problem("disguised", file.path, "", "named like a PNG picture, but is not one")
        return
    for _ in range(_MAX_CHUNKS):
        head = file.read_at(at, 8)
        # Length, type and checksum take 4 bytes each.
        at += 12 + int.from_bytes(head[:4], "big")
        if len(head) < 8 or at > file.size:
            yield Problem("malformed", file.path, "", "a PNG picture without its end")
            return
        if head[4:] == b"IEND":
            break
    if at < file.size:
        yield Problem("trailing-data", file.path, "", f"{file.size - at} bytes follow the end of the picture")


def polyglot(file: ScannedFile) -> Iterator[Problem]:
    """Yield what other programs would find in a file of bytes."""
    embedded = {item.kind: item for item in archives.find_embedded(file)}
    at_end = archives.zip_in(file)
    if at_end is not None:
        embedded["zip"] = at_end
    for kind, item in embedded.items():
        message = f"{kind} at byte {item.offset}" + (f": {item.pickle}" if item.pickle else "")
        yield Problem("polyglot", file.path, "", message)


def _text_problems(file: ScannedFile, text: str, key: str = "") -> Iterator[Problem]:
    for message in markup.active_content(text) if "<" in text or "&" in text else ():
        yield Problem("active-markup", file.path, key, f"its header has {message}")

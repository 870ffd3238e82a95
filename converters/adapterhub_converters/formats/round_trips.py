"""What each format supports, as `probe` measures it: read and written, with a base or without, and round trips that are exact.

Kept as data because measuring takes a second; a test compares.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import FORMATS, PACKAGES, WRITTEN

BYTES, FUNCTION, NO = "bytes", "function", "no"
"""What is recovered of a file after conversion to another format and back: its bytes, its function, or nothing."""
NAME = "NAME"
MARKS = {"=": BYTES, "~": FUNCTION, "-": NO}


@dataclass(frozen=True)
class Row:
    """What one format supports.

    Attributes:
        name: Its name in the table of formats.
        files: The names of its files; NAME stands for the one that the user chooses.
        reads: Whether it can be read.
        writes: Whether it can be written.
        base: Whether writing needs a base.
        back: Every other format that can be written to what is recovered of a file of this one after conversion to it and
            back; empty for one that can only be read.
    """

    name: str
    files: tuple[str, ...]
    reads: bool
    writes: bool
    base: bool
    back: dict[str, str]


_NAMES = (*WRITTEN, *PACKAGES)
_WITH_BASE = ("gguf", "kohya", "torchtune", "litgpt", "megatron", "ollama")
# A line for each format: what is recovered after the way to each of them and back, in the order of the table.
_BACK = """
  = = = = = = = = =
=   = - - = = = = =
= =   - - = = = = =
= - -   = - - - = -
= - - =   - - - = -
= = = - -   = = = =
= = = - - =   = = =
= = = - - = =   = =
= = = = = = = =   =
= = = - - = = = =
"""


def rows() -> list[Row]:
    """A row for each format, in the order of the table."""
    lines = dict(zip(_NAMES, _BACK.splitlines()[1:], strict=True))
    return [_row(name, lines.get(name, "")) for name in (*FORMATS, *PACKAGES)]


def _row(name: str, line: str) -> Row:
    marks = zip(_NAMES, line[::2].ljust(len(_NAMES)), strict=True) if line else ()
    back = {other: MARKS[mark] for other, mark in marks if other != name}
    files = FORMATS[name].files or (f"{NAME}{FORMATS[name].suffix}",) if name in FORMATS else ("Modelfile", f"{NAME}.gguf")
    return Row(name, files, reads=True, writes=bool(line), base=name in _WITH_BASE, back=back)

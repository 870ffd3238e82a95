"""What each format supports, as measured by `format_probe`: reading, writing with or without a base, and exact round trips.

Kept as data because the measurement takes a second; a test compares the two.
"""

from __future__ import annotations

from adapterhub_converters.lazy_dataclass import dataclass

from . import FORMATS, PACKAGES, WRITTEN

BYTES, FUNCTION, NO = "bytes", "function", "no"
"""What is recovered of a file after conversion to another format and back: its bytes, its function, or nothing."""
NAME = "NAME"
MARKS = {"=": BYTES, "~": FUNCTION, "-": NO}


@dataclass(frozen=True)
class Row:
    """The capabilities of one format.

    Attributes:
        name: Its name in the table of formats.
        files: The names of its files; NAME is a placeholder for the name that the user chooses.
        reads: Whether it can be read.
        writes: Whether it can be written.
        base: Whether writing needs a base.
        back: For every other writable format, what is recovered of a file of this format after conversion to it and back;
            empty for a format that can only be read.
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
    """Return a row for each format, in the order of the table."""
    lines = dict(zip(_NAMES, _BACK.splitlines()[1:], strict=True))
    return [_row(name, lines.get(name, "")) for name in (*FORMATS, *PACKAGES)]


def _row(name: str, line: str) -> Row:
    marks = zip(_NAMES, line[::2].ljust(len(_NAMES)), strict=True) if line else ()
    back = {other_format: MARKS[mark] for other_format, mark in marks if other_format != name}
    files = FORMATS[name].files or (f"{NAME}{FORMATS[name].suffix}",) if name in FORMATS else ("Modelfile", f"{NAME}.gguf")
    return Row(name, files, reads=True, writes=bool(line), base=name in _WITH_BASE, back=back)

"""Cutting a stream into lines: pieces arrive cut anywhere."""

from __future__ import annotations


class LineCutter:
    """Cuts one stream.

    Attributes:
        remainder: The beginning of the line that is not complete yet.
    """

    def __init__(self) -> None:
        self.remainder = b""

    def cut(self, piece: bytes) -> list[bytes]:
        """Return the lines that a piece completes, without their ends."""
        *lines, self.remainder = (self.remainder + piece).split(b"\n")
        return lines

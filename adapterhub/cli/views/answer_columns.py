"""Answers of models while they arrive: one after the other, or two side by side."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import field

from adapterhub.cli import output
from adapterhub_converters.display import printable
from adapterhub_converters.lazy_dataclass import dataclass

WIDE = 80
"""The columns of a terminal from which on two answers fit side by side."""


class OneByOne:
    """Answers below each other: each begins when the one before has ended, and is buffered until then.

    Args:
        titles: A heading for each answer, if there are several.
        note: Prints the facts about an answer that has ended.
    """

    def __init__(self, titles: Sequence[str], note: Callable[[str], object]) -> None:
        self._titles, self._note = titles, note
        self._kept = [""] * len(titles)
        self._notes: list[str | None] = [None] * len(titles)
        self._now, self._begun = 0, False
        self._stream = output.Stream()

    def show(self, side: int, piece: str) -> None:
        """Show a piece of an answer, or keep it for later."""
        if side != self._now:
            self._kept[side] += piece
            return
        self._begin()
        self._stream.write(piece)

    def end(self, side: int, note: str) -> None:
        """End an answer."""
        self._notes[side] = note
        while self._now < len(self._notes) and (ended := self._notes[self._now]) is not None:
            self.close()
            self._note(ended)
            self._now, self._begun = self._now + 1, False
            if self._now < len(self._kept):
                self.show(self._now, self._kept[self._now])

    def close(self) -> None:
        """End the last line."""
        self._begin()
        self._stream.end()

    def _begin(self) -> None:
        if len(self._titles) > 1 and not self._begun:
            output.write(output.color(f"{self._titles[self._now]}:", "bold"))
        self._begun = True


@dataclass
class _Column:
    """The lines of an answer, each with whether it is dim; `line` is the one that still grows."""

    width: int
    lines: list[tuple[str, bool]] = field(default_factory=list)
    line: str = ""
    ended: bool = False

    def add(self, piece: str) -> None:
        first, *following = map(printable, piece.expandtabs(4).split("\n"))
        self._grow(first)
        for text in following:
            self.lines.append((self.line, False))
            self.line = ""
            self._grow(text)

    def _grow(self, text: str) -> None:
        *complete, self.line = wrap_cells(self.line + text, self.width)
        self.lines += [(line, False) for line in complete]

    def end(self, note: str) -> None:
        self.lines += [(self.line, False)] if self.line else []
        self.lines += [(line, True) for line in wrap_cells(printable(note), self.width)]
        self.line, self.ended = "", True

    def cell(self, row: int) -> str:
        text, dim = self.lines[row] if row < len(self.lines) else (self.line if row == len(self.lines) else "", False)
        padded = text + " " * (self.width - cells(text))
        return output.color(padded, "dim") if dim else padded


class SideBySide:
    """Answers in columns. A row is printed when all columns have passed it, so only the last line is ever redrawn.

    Args:
        titles: A heading for each column.
        screen: The columns of the terminal.
    """

    def __init__(self, titles: Sequence[str], screen: int) -> None:
        self._bar = " │ " if output.has_blocks() else " | "
        # The last column of the terminal stays free: after a character there, some terminals begin a new line.
        column_width = (screen - 1 - len(self._bar) * (len(titles) - 1)) // len(titles)
        self._columns = [_Column(column_width) for _ in titles]
        self._row, self._open = 0, False
        heads = [wrap_cells(printable(title), column_width)[0] for title in titles]
        cut = [output.color(head + " " * (column_width - cells(head)), "bold") for head in heads]
        output.redraw(self._bar.join(cut), is_final=True)

    def show(self, side: int, piece: str) -> None:
        """Show a piece of an answer."""
        self._columns[side].add(piece)
        self._draw()

    def end(self, side: int, note: str) -> None:
        """End an answer with the facts about it."""
        self._columns[side].end(note)
        self._draw()

    def close(self) -> None:
        """End the last line."""
        if self._open:
            output.redraw(self._text(), is_final=True)
        self._open = False

    def _draw(self) -> None:
        # A row is final when each column has ended or has a line after it.
        while any(self._row < len(column.lines) for column in self._columns) and all(
            column.ended or self._row < len(column.lines) for column in self._columns
        ):
            output.redraw(self._text(), is_final=True)
            self._row, self._open = self._row + 1, False
        if not all(column.ended for column in self._columns):
            output.redraw(self._text(), is_final=False)
            self._open = True

    def _text(self) -> str:
        return self._bar.join(column.cell(self._row) for column in self._columns)


def cells(text: str) -> int:
    """Return the columns of a terminal that a printable text takes: two for each character of East Asian width."""
    return len(text) if text.isascii() else sum(map(_cell, text))


def _cell(char: str) -> int:
    return 0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1


def wrap_cells(text: str, columns: int) -> list[str]:
    """Break a printable line into pieces of at most `columns` cells, between words if there is a space; indentation stays."""
    return [*_wrapped_pieces(text, columns)]


def _wrapped_pieces(text: str, columns: int) -> Iterator[str]:
    start = used = 0
    space = -1
    for index, char in enumerate(text):
        used += _cell(char)
        if char == " ":
            space = index
        if used > columns and index > start:
            cut = space + 1 if space >= start else index
            yield text[start:cut].rstrip(" ")
            start, used = cut, cells(text[cut : index + 1])
    yield text[start:]

"""Pickles by what they do, whatever their names: opcodes are read one by one, and none is executed.

A pickle is a program (pickletools): it imports functions by name and calls them while it is loaded. Protocols 2 to 5 announce
themselves by two bytes; 0 and 1 begin with any opcode, so that a text file can be one. Those are recognized by what they do:
import something and call it before the first byte that is no opcode, at which a loader would stop too late.
"""

from __future__ import annotations

import io
import itertools
import pickletools
import struct
from collections.abc import Iterator
from typing import Any

from adapterhub_converters.adapter_files import HEAD_SIZE, starts_like_pickle, starts_like_safetensors
from adapterhub_converters.lazy_dataclass import dataclass

MAX_BYTES = 16 << 20  # of a pickle that are looked at
_MAX_OPCODES = 500_000
_MAX_IMPORTS = 10_000
_MAX_NAME = 200  # characters of a name that is kept: an opcode of two bytes pushes one of megabytes again
_CALLS = {"REDUCE", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD"}
_TEXTS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING"}
_PUTS, _GETS = {"BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"}, {"BINGET", "LONG_BINGET", "GET"}
_EXTENSIONS = {"EXT1", "EXT2", "EXT4"}
# What torch imports to build tensors (torch/_weights_only_unpickler.py); it is named last.
_OF_TENSORS = ("collections.OrderedDict", "torch._utils._rebuild", "torch.", "numpy.")


@dataclass(frozen=True, slots=True)
class Pickle:
    """The effects of loading a pickle.

    Attributes:
        imports: Names of what it imports, those that build no tensors first.
        calls: Whether it calls what it imports.
    """

    imports: tuple[str, ...]
    calls: bool

    def __str__(self) -> str:
        if not self.imports:
            return "a pickle can run code when it is loaded"
        others_text = f" and {len(self.imports) - 3} more" if len(self.imports) > 3 else ""
        names = ", ".join(name[:80] for name in self.imports[:3])
        return f"a pickle that {'calls' if self.calls else 'imports'} {names}{others_text} when it is loaded"


def find(data: bytes) -> Pickle | None:
    """Return the effects of the pickle that `data` begins with, the first `MAX_BYTES` of a file; None if it is not a pickle."""
    announced = starts_like_pickle(data[:HEAD_SIZE]) and data[:1] == b"\x80" and not starts_like_safetensors(data[:HEAD_SIZE])
    imports: dict[str, None] = {}
    calls = False
    file, budget = io.BytesIO(data), itertools.count()
    ended = True
    while ended and file.tell() < len(data):  # torch's older format is several in a row
        machine = _Machine()
        ended = machine.run(file, budget)
        imports |= dict.fromkeys(machine.imports)
        calls = calls or machine.calls
    # Protocols 0 and 1 have no mark: count the bytes as a pickle only if they import and call something.
    if not announced and not (imports and calls):
        return None
    return Pickle(tuple(sorted(imports, key=lambda name: name.startswith(_OF_TENSORS))), calls)


class _Machine:
    """The state of a loader up to an opcode, without values."""

    def __init__(self) -> None:
        self.imports: list[str] = []
        self.calls = False
        self._stack: list[bool] = []  # of each value on it, if it is a mark
        self._texts: list[str] = []  # those that were pushed last, of which STACK_GLOBAL takes two
        self._memo: dict[int, str] = {}

    def run(self, file: io.BytesIO, budget: Iterator[int]) -> bool:
        """Read one pickle; return False if it does not end, or not within the budget."""
        try:
            for opcode, argument, _ in pickletools.genops(file):
                # A hostile file may have millions of opcodes, so these and the imports are bounded.
                if next(budget) > _MAX_OPCODES or len(self.imports) > _MAX_IMPORTS:
                    return False
                self._move(opcode)
                self._read(opcode.name, argument)
        except (ValueError, IndexError, KeyError, EOFError, OverflowError, struct.error):
            return False
        return True

    def _move(self, opcode: pickletools.OpcodeInfo) -> None:
        """Pop and push as an opcode does; raises IndexError where a loader would, too."""
        before = opcode.stack_before
        if pickletools.markobject in before:
            while not self._stack.pop():
                pass
            before = before[: before.index(pickletools.markobject)]
        for _ in before:
            self._stack.pop()
        self._stack += [value is pickletools.markobject for value in opcode.stack_after]

    def _read(self, name: str, argument: Any) -> None:
        """Follow texts through stack and memo, and record imports and calls."""
        if name in _TEXTS:
            self._texts = [*self._texts[-1:], str(argument)[:_MAX_NAME]]
        elif name in _PUTS and self._texts and len(self._memo) < _MAX_IMPORTS:
            self._memo[len(self._memo) if argument is None else int(argument)] = self._texts[-1]
        elif name in _GETS:
            self._texts = [*self._texts[-1:], self._memo.get(int(argument), "?")]
        elif name in ("GLOBAL", "INST"):
            module, _, attribute = str(argument).partition(" ")
            self.imports.append(f"{_identifier(module)}.{_identifier(attribute)}"[: 2 * _MAX_NAME])
        elif name == "STACK_GLOBAL":
            self.imports.append(".".join(self._texts) or "?")
        elif name in _EXTENSIONS:
            self.imports.append(f"extension {argument}")
        self.calls = self.calls or (name in _CALLS and bool(self.imports))


def _identifier(text: str) -> str:
    """Return a name that Python can import; ValueError for any other, at which a loader stops."""
    if not all(part.isidentifier() for part in text.split(".")):
        raise ValueError
    return text

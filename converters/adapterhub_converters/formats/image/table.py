"""The table of one family of models: a trainer's names of the modules, and diffusers'.

A table is closed: a name is in it or unknown. `N` in a path stands for a number. Trainers that follow sd-scripts write `_` for
`.`, so that the boundaries of names are lost; a table recovers them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

from adapterhub_converters import linear
from adapterhub_converters.patterns import escape


@dataclass(frozen=True)
class Reading:
    """A trainer's module: one module of the base, or several whose rows are concatenated.

    Attributes:
        targets: The base's modules.
        swapped: Whether the two halves of its rows are swapped; for a module with `halves`, only if it has that many rows per
            column.
        ratio: The number of rows per column, if it is the same in every model of the family.
        shares: The proportions of the rows of `targets`.
        halves: See `swapped`.
    """

    targets: tuple[str, ...]
    swapped: bool = False
    ratio: Fraction | None = field(default=None, compare=False)
    shares: tuple[int, ...] = field(default=(), compare=False)
    halves: Fraction | None = field(default=None, compare=False)

    def filled(self, numbers: tuple[str, ...]) -> Reading:
        """A copy with numbers for every `N`."""
        return replace(self, targets=tuple(_filled(target, numbers) for target in self.targets))

    def of(self, prefix: str) -> Reading:
        """A copy with a prefix before its targets."""
        return replace(self, targets=tuple(f"{prefix}{target}" for target in self.targets))

    def excludes(self, outline: tuple[int, int] | None) -> bool:
        """Whether a module of that many rows and columns cannot be this one."""
        return self.ratio is not None and outline is not None and Fraction(*outline) != self.ratio

    def is_turned(self, rows: int, columns: int) -> bool:
        """Whether the halves of that many rows are swapped."""
        return self.swapped and (self.halves is None or Fraction(rows, columns) == self.halves)


@dataclass(frozen=True, eq=False)
class Table:
    """The modules of one family of models.

    Attributes:
        name: The family's common name.
        part: The model of a pipeline that it names.
        modules: A trainer's path, or pattern of paths, to the base's modules.
        prefix: The prefix of a name that is written; one that ends in a dot has the dots of names preserved.
        headers: A pattern of the family's names in headers.
        classes: A pattern of the beginning of diffusers' names of its models and pipelines.
        writes: Whether the table is used for writing: the tools that read these names read no others.
        variant: Whether another table of the family is the one to write, unless the source had these names.
        shared: Whether other families have modules of the same names, so that names alone do not determine the family.
    """

    name: str
    part: str
    modules: Mapping[str, Reading]
    prefix: str = "lora_unet_"
    headers: str = ""
    classes: str = ""
    writes: bool = True
    variant: bool = False
    shared: bool = False

    def read(self, stem: str) -> Reading | None:
        """The module that `stem` names, in which dots may be underscores; None if it is not in the table."""
        for pattern, reading in self._patterns.get(_shape(stem.replace(".", "_")), ()):
            match = pattern.fullmatch(stem)
            if match:
                return reading.filled(match.groups())
        return None

    def written(self, target: str) -> tuple[str, Reading] | None:
        """The trainer's path of the module that contains `target`, and that module; None if it is not in the table."""
        for pattern, path, reading in self._inverse.get(_shape(target), ()):
            match = pattern.fullmatch(target)
            if match:
                return _filled(path, match.groups()), reading.filled(match.groups())
        return None

    @functools.cached_property
    def _patterns(self) -> dict[str, list[tuple[linear.Pattern, Reading]]]:
        found: dict[str, list[tuple[linear.Pattern, Reading]]] = {}
        for path, reading in self.modules.items():
            found.setdefault(_shape(_numbered(path).replace(".", "_")), []).append((_pattern(path, r"[._]"), reading))
        return found

    @functools.cached_property
    def _inverse(self) -> dict[str, list[tuple[linear.Pattern, str, Reading]]]:
        found: dict[str, list[tuple[linear.Pattern, str, Reading]]] = {}
        for path, reading in self.modules.items():
            for target in reading.targets:
                found.setdefault(_shape(_numbered(target)), []).append((_pattern(target, r"\."), path, reading))
        return found


def _shape(path: str) -> str:
    """A path without its numbers, as a key: only the few entries with the same one are matched."""
    shape = path.translate(_AS_MARKS)
    while "##" in shape:  # each round halves them
        shape = shape.replace("##", "#")
    return shape


_AS_MARKS = str.maketrans("0123456789", "#" * 10)


def _pattern(path: str, dot: str) -> linear.Pattern:
    words = ("(0|[1-9][0-9]{0,3})" if word == "N" else escape(word) for word in path.split("."))
    return linear.Pattern(dot.join(words))


def _numbered(path: str) -> str:
    return _filled(path, ("0",) * path.split(".").count("N"))


def _filled(path: str, numbers: tuple[str, ...]) -> str:
    left = iter(numbers)
    return ".".join(next(left) if word == "N" else word for word in path.split("."))


def joined(stem: str, ends: str) -> list[str]:
    """`stem.end` for every word of `ends`."""
    return [f"{stem}.{end}" for end in ends.split()]


def own(*paths: str) -> dict[str, Reading]:
    """Modules with the same name in the trainer and in diffusers."""
    return {path: Reading((path,)) for path in paths}


def renamed(pairs: Iterable[tuple[str, str]]) -> dict[str, Reading]:
    """Modules that are one of diffusers' each, under another name."""
    return {theirs: Reading((ours,)) for theirs, ours in pairs}

"""Errors of every layer: where, what, how to fix it, and the exit code of the command line.

They are in the lowest layer so that format readers, the registry, and the command line share one hierarchy. A module defines
its own more specific errors as subclasses, next to the code that raises them.

    AdapterhubError        70  a bug if raised directly
    ├── UsageError          2  a malformed command, config file, or ref
    │   ├── ParameterError  2  an argument has an invalid value
    │   └── OutputExistsError  2  the output exists already
    ├── NotFoundError       3  no such file, ref, or adapter
    ├── IntegrityError      4  bytes are not the expected ones
    │   └── FormatError     4  a file is malformed, truncated, or hostile
    ├── RemoteError         5  another machine refused, failed, or did not answer
    ├── RefusedError        6  the result would be wrong, so nothing was written
    │   └── NotUnderstoodError 6  an adapter of a kind that is not known here
    ├── ConflictError       7  another writer moved the ref first
    ├── LocalIOError        8  a local disk or permission error
    ├── MissingExtraError   9  an optional dependency is missing
    └── StoppedError      130  a signal stopped the work; finished work is kept
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import ClassVar, Generic, TypeVar


class AdapterhubError(Exception):
    """An error with its place, its cause, and a fix; `str()` is the line shown to the user.

    Attributes:
        code: A stable name, such as `base-required`, for programs that react to this error and for `explain`.
        default_code: The code of an error that is raised without one of its own; every class has its own.
        fields: The values that the error is about, by name. The command line writes its own hint from `code` and `fields`.
        problems: All problems if several were found at once, one line each; the first of them is the error itself. Else empty.
        worded: True once the command line has put the error into its own words, which are then kept.
    """

    exit_code: ClassVar[int] = 70
    default_code: ClassVar[str] = "internal-error"
    problems: tuple[str, ...] = ()
    worded = False

    def __init__(self, where: str, what: str, hint: str = "", *, code: str = "", **fields: object) -> None:
        super().__init__(where, what, hint)
        self.where = where
        self.what = what
        self.hint = hint
        self.code = code or self.default_code
        self.fields = fields

    def rename(self, old: str, new: str) -> None:
        """Name a place by `new`, such as an address, wherever the error has `old`, such as a temporary folder."""
        self.where, self.what, self.hint, *problems = (
            text.replace(old, new) for text in (self.where, self.what, self.hint, *self.problems)
        )
        self.problems = tuple(problems)
        for name, value in self.fields.items():
            if isinstance(value, str | os.PathLike):
                self.fields[name] = os.fspath(value).replace(old, new)

    @property
    def own_code(self) -> str:
        """The code, or empty if it is only that of the class."""
        return "" if self.code == self.default_code else self.code

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        return f"{line}. {self.hint}" if self.hint else line


class UsageError(AdapterhubError):
    """A command, config file, or ref is malformed."""

    exit_code = 2
    default_code = "invalid-usage"


class ParameterError(UsageError):
    """An argument of a function has an invalid value; `where` is the parameter's name.

    The command line shows the corresponding option instead.
    """

    default_code = "invalid-parameter"

    def __init__(self, parameter: str, what: str, hint: str = "", *, code: str = "", **fields: object) -> None:
        super().__init__(parameter, what, hint, code=code, **fields)
        self.parameter = parameter


class OutputExistsError(UsageError):
    """The output exists already; nothing is overwritten."""

    default_code = "already-exists"

    def __init__(self, where: str, what: str = "already exists", hint: str = "Name another, or remove it first") -> None:
        super().__init__(where, what, hint)


class NotFoundError(AdapterhubError):
    """No such file, ref, or adapter."""

    exit_code = 3
    default_code = "not-found"


class IntegrityError(AdapterhubError):
    """Bytes are not the expected ones."""

    exit_code = 4
    default_code = "integrity"


class FormatError(IntegrityError):
    """A file is malformed, truncated, or hostile; none of it was used."""

    default_code = "malformed"


class RemoteError(AdapterhubError):
    """Another machine refused, failed, or did not answer."""

    exit_code = 5
    default_code = "remote-error"


class RefusedError(AdapterhubError):
    """The result would silently differ from the requested one, so there is none.

    `items` are all reasons, one line each, `name: reason` for a tensor or module; empty if the error's line has the only one.
    """

    exit_code = 6
    default_code = "refused"

    def __init__(
        self, where: str, what: str, hint: str = "", items: Sequence[str] = (), *, code: str = "", **fields: object
    ) -> None:
        super().__init__(where, what, hint, code=code, **fields)
        self.items = tuple(items)


class NotUnderstoodError(RefusedError):
    """An adapter is of a kind that is not known here: a registry keeps it as it is, but nothing can be computed with it.

    A defect in an adapter of a known kind is another error.
    """

    default_code = "not-understood"


def refused_error(
    location: str,
    reasons: Sequence[str],
    hint: str = "",
    kind: type[RefusedError] = RefusedError,
    /,
    *,
    code: str = "",
    **fields: object,
) -> RefusedError:
    """Return one error of `kind` for all `reasons`: its line contains the first, `items` all of them."""
    count_text = f" (and {len(reasons) - 1} more like it)" if len(reasons) > 1 else ""
    return kind(location, reasons[0] + count_text, hint, reasons, code=code, **fields)


class ConflictError(AdapterhubError):
    """A ref moved since it was read."""

    exit_code = 7
    default_code = "conflict"


class LocalIOError(AdapterhubError):
    """The disk is full, a folder is not writable, or a file disappeared."""

    exit_code = 8
    default_code = "io-error"


class MissingExtraError(AdapterhubError):
    """An optional dependency is missing; the hint is the command to install it."""

    exit_code = 9
    default_code = "missing-extra"


class StoppedError(AdapterhubError):
    """A signal stopped the work early; finished work is kept, and the hint says how to resume."""

    exit_code = 130
    default_code = "interrupted"


E = TypeVar("E", bound=AdapterhubError)


class Problems(Generic[E]):
    """Problems of one document, gathered so that all of them can be raised at once: the first few, and a count."""

    SHOWN = 20

    def __init__(self) -> None:
        self.count = 0
        self._first: list[E] = []

    def add(self, error: E) -> None:
        """Add a problem."""
        self.count += 1
        if len(self._first) < self.SHOWN:
            self._first.append(error)

    def check(self, *, more: str = "more problems") -> None:
        """Raise the problems, if there are any, as one error of the first one's class; `more` names those not shown."""
        if not self._first:
            return
        first = self._first[0]
        if self.count > 1:
            hidden = self.count - len(self._first)
            # The first problem becomes the error: its class decides the exit code.
            first.problems = (*map(str, self._first), *([f"{hidden:,} {more}"] if hidden else []))
            first.what += f" (and {self.count - 1:,} more)"
        raise first

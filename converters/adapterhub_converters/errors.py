"""The errors every layer raises: where, what, how to fix, and the exit code the command line gives them.

They live in the lowest layer so that a format reader, the registry and the command line share one family. A
module defines its own more specific error beside the code that raises it, as a subclass of one of these.

    AdapterhubError        70  a bug of ours when raised bare
    ├── UsageError          2  the words of the command, a config file or a ref are wrong
    │   ├── ParameterError  2  an argument has a value it cannot take
    │   └── OutputExistsError  2  what should be written is there already
    ├── NotFoundError       3  no such file, ref or adapter
    ├── IntegrityError      4  bytes are not what they should be
    │   └── FormatError     4  a file is malformed, truncated or hostile
    ├── RemoteError         5  another machine said no, or said nothing
    ├── RefusedError        6  the result would be wrong, so there is none
    ├── ConflictError       7  somebody else moved the ref first
    ├── LocalIOError        8  this machine's disk or permissions
    ├── MissingExtraError   9  an optional dependency isn't installed
    └── StoppedError      130  a signal ended the work; what was done is kept
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class AdapterhubError(Exception):
    """Where it happened, what is wrong, and how to fix it; `str()` is the one line people see.

    Attributes:
        code: A stable name for callers that react to this error, such as `base-required`; empty where nobody does.
        fields: The values that the error is about, by name. The command line writes its own hint from `code` and `fields`.
    """

    exit_code: ClassVar[int] = 70

    def __init__(self, where: str, what: str, hint: str = "", *, code: str = "", **fields: object) -> None:
        super().__init__(where, what, hint)
        self.where = where
        self.what = what
        self.hint = hint
        self.code = code
        self.fields = fields

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        return f"{line}. {self.hint}" if self.hint else line


class UsageError(AdapterhubError):
    """The words of a command, a config file or a ref do not mean anything."""

    exit_code = 2


class ParameterError(UsageError):
    """An argument of a function has a value it cannot take; `where` is the parameter's name.

    The command line shows the option of that name in its place.
    """

    def __init__(self, parameter: str, what: str, hint: str = "", *, code: str = "", **fields: object) -> None:
        super().__init__(parameter, what, hint, code=code, **fields)
        self.parameter = parameter


class OutputExistsError(UsageError):
    """What should be written is there already; nothing is overwritten."""

    def __init__(self, where: str) -> None:
        super().__init__(where, "already exists", "Name another, or remove it first")


class NotFoundError(AdapterhubError):
    """No such file, ref or adapter."""

    exit_code = 3


class IntegrityError(AdapterhubError):
    """Bytes are not the ones that were promised."""

    exit_code = 4


class FormatError(IntegrityError):
    """A file is malformed, truncated or hostile; nothing of it was believed."""


class RemoteError(AdapterhubError):
    """Another machine refused, failed or did not answer."""

    exit_code = 5


class RefusedError(AdapterhubError):
    """The result would silently differ from what was asked for, so there is none.

    `items` are all the reasons, one line each, `name: reason` where a tensor or module is one; empty when the one line
    of the error says it all.
    """

    exit_code = 6

    def __init__(
        self, where: str, what: str, hint: str = "", items: Sequence[str] = (), *, code: str = "", **fields: object
    ) -> None:
        super().__init__(where, what, hint, code=code, **fields)
        self.items = tuple(items)


def refused(where: str, reasons: Sequence[str], hint: str = "", *, code: str = "", **fields: object) -> RefusedError:
    """One error for all `reasons`: its line has the first, `items` have every one."""
    more = f" (and {len(reasons) - 1} more like it)" if len(reasons) > 1 else ""
    return RefusedError(where, reasons[0] + more, hint, reasons, code=code, **fields)


class ConflictError(AdapterhubError):
    """A ref moved since it was read."""

    exit_code = 7


class LocalIOError(AdapterhubError):
    """The disk is full, a folder cannot be written, a file vanished."""

    exit_code = 8


class MissingExtraError(AdapterhubError):
    """A command needs an optional dependency; the hint is the line that installs it."""

    exit_code = 9


class StoppedError(AdapterhubError):
    """A signal ended the work early; what was done is kept, and the hint says how to go on."""

    exit_code = 130

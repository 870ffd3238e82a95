"""The request that is being answered: who asks, from where, and its number in the log.

It is kept in the context of the task that answers, and of the threads that work for it, so that what is written below, such as
the author of a move, need not be handed through every call.
"""

from __future__ import annotations

import secrets
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class Asking:
    """A request.

    Attributes:
        address: Of the client; empty for none.
        account: Who asks, once that is known; empty for nobody.
        prefix: The first characters of their token.
        names: The repositories in which they asked to change something.
        warning: What the client is warned of in the header of its answer; empty for nothing.
        id: 16 hexadecimal digits, in the log and in the answer.
    """

    address: str = ""
    account: str = ""
    prefix: str = ""
    names: list[str] = field(default_factory=list)
    warning: str = ""
    id: str = field(default_factory=lambda: secrets.token_hex(8))

    def known(self, account: str, prefix: str) -> None:
        """Record who asks."""
        self.account, self.prefix = account, prefix

    def changes(self, name: str) -> None:
        """Record what they want to change."""
        if name not in self.names:
            self.names.append(name)


_NOW: ContextVar[Asking | None] = ContextVar("_NOW", default=None)


def begin(address: str) -> Asking:
    """Begin a request in the task that answers it."""
    made = Asking(address)
    _NOW.set(made)
    return made


def now() -> Asking:
    """The request that this task answers; an empty one outside of any."""
    return _NOW.get() or Asking()

"""The challenges of a `WWW-Authenticate` header (RFC 9110, section 11.6.1), each character of which is looked at once."""

from __future__ import annotations

import string
from collections.abc import Iterable

MAX_HEADER = 1 << 14  # characters; those of registries have some 200
_TOKEN = frozenset(string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~")  # section 5.6.2


def parse(headers: Iterable[str]) -> dict[str, dict[str, str]]:
    """Each scheme in lower case to its parameters, the first of a name; a header that is too long counts as none."""
    found: dict[str, dict[str, str]] = {}
    for header in headers:
        if len(header) <= MAX_HEADER:
            _Scanner(header).into(found)
    return found


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def into(self, found: dict[str, dict[str, str]]) -> None:
        """Read to the end, or to the first character that cannot be there."""
        parameters: dict[str, str] = {}
        while True:
            self._skip(" \t,")
            name = self._token().lower()
            if not name:
                return
            self._skip(" \t")
            if self._next() != "=":
                parameters = found.setdefault(name, {})
                continue
            self.at += 1
            self._skip(" \t")
            parameters.setdefault(name, self._quoted() if self._next() == '"' else self._token())

    def _next(self) -> str:
        return self.text[self.at : self.at + 1]

    def _skip(self, characters: str) -> None:
        while self.at < len(self.text) and self.text[self.at] in characters:
            self.at += 1

    def _token(self) -> str:
        begin = self.at
        while self.at < len(self.text) and self.text[self.at] in _TOKEN:
            self.at += 1
        return self.text[begin : self.at]

    def _quoted(self) -> str:
        """A quoted string, where a backslash stands before a character that is meant as it is."""
        found = []
        self.at += 1
        while self.at < len(self.text) and self.text[self.at] != '"':
            self.at += self.text[self.at] == "\\"
            found.append(self._next())
            self.at += 1
        self.at += 1
        return "".join(found)

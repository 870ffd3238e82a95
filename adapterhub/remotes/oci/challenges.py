"""The challenges of a `WWW-Authenticate` header (RFC 9110, section 11.6.1), parsed in one pass over its characters."""

from __future__ import annotations

import string
from collections.abc import Iterable

MAX_HEADER = 1 << 14  # characters; those of registries have some 200
_TOKEN = frozenset(string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~")  # section 5.6.2


def parse(headers: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return the parameters of each scheme, which is in lower case. Only a scheme's first value of a parameter counts.

    Headers of more than MAX_HEADER characters are ignored.
    """
    challenges: dict[str, dict[str, str]] = {}
    for header in headers:
        if len(header) <= MAX_HEADER:
            _Scanner(header).read_into(challenges)
    return challenges


class _Scanner:
    """A scanner of one header, which never moves back."""

    def __init__(self, text: str) -> None:
        self.text, self.position = text, 0

    def read_into(self, challenges: dict[str, dict[str, str]]) -> None:
        """Read up to the end, or to the first character that is not allowed."""
        parameters: dict[str, str] = {}
        while True:
            self._skip(" \t,")
            name = self._token().lower()
            if not name:
                return
            self._skip(" \t")
            # A word without `=` is a scheme; what follows up to the next one are its parameters.
            if self._peek() != "=":
                parameters = challenges.setdefault(name, {})
                continue
            self.position += 1
            self._skip(" \t")
            parameters.setdefault(name, self._quoted_string() if self._peek() == '"' else self._token())

    def _peek(self) -> str:
        return self.text[self.position : self.position + 1]

    def _skip(self, characters: str) -> None:
        while self.position < len(self.text) and self.text[self.position] in characters:
            self.position += 1

    def _token(self) -> str:
        start = self.position
        while self.position < len(self.text) and self.text[self.position] in _TOKEN:
            self.position += 1
        return self.text[start : self.position]

    def _quoted_string(self) -> str:
        """Return the content of a quoted string; a backslash makes the next character literal."""
        characters = []
        self.position += 1
        while self.position < len(self.text) and self.text[self.position] != '"':
            self.position += self.text[self.position] == "\\"
            characters.append(self._peek())
            self.position += 1
        self.position += 1
        return "".join(characters)

"""Keys that a user has accepted for a namespace: once one is known there, what comes from there must be signed by one of them.

A file of lines `SCOPE KIND KEY`, as ssh keeps the keys of hosts: the namespace, and the key without the first and last line of
its PEM. A namespace that was free again after its owner left, and that somebody else has taken, is refused by it.
"""

from __future__ import annotations

import binascii
from dataclasses import dataclass
from pathlib import Path

from adapterhub import user_files
from adapterhub_converters.errors import UsageError

from .keys import PublicKey, parse_public

_HEAD = "# Who signs what comes from where, one key a line. Remove a line to forget it.\n"
_BEGIN, _END = "-----BEGIN PUBLIC KEY-----\n", "\n-----END PUBLIC KEY-----\n"


@dataclass(frozen=True)
class KnownSigners:
    """The keys in a file, which need not be there."""

    path: Path

    def of(self, scope: str) -> list[PublicKey]:
        """Return the keys that are known for a namespace."""
        return [_parsed(line, self.path) for line in user_files.read(self.path).splitlines() if line.split(" ")[0] == scope]

    def keep(self, scope: str, key: PublicKey) -> bool:
        """Remember a key of a namespace; return False if it was known."""
        line = f"{scope} {key.kind} {''.join(key.pem.decode().splitlines()[1:-1])}\n"
        return user_files.change(self.path, lambda text: None if line in text else (text or _HEAD) + line)


def _parsed(line: str, path: Path) -> PublicKey:
    try:
        _scope, _kind, key = line.split(" ")
        binascii.a2b_base64(key, strict_mode=True)
    except ValueError as error:  # a line that says nothing would let anything through
        raise UsageError(str(path), f"{line[:80]!r} is not a namespace, a kind and a key", "Remove the line") from error
    return parse_public(f"{_BEGIN}{key}{_END}", str(path))

"""Routes and keys of a gateway, a TOML file.

[routes.legal]                                    # a name that requests may ask for
to = "team/legal:prod"                            # or shares: { "team/legal:v7" = 90, "team/legal:v8" = 10 }

[[routes.legal.when]]                             # the first that fits decides
header = "x-stage: beta"                          # or user = "ada", or key = "research"
to = "team/legal:beta"

[keys.research]                                   # with keys, nobody is answered without one
sha256 = "…"                                      # of the key
adapters = ["legal", "team/*"]                    # the names that it may ask for; all if absent
requests = "600/60"                               # so many in so many seconds
running = 8                                       # so many at once
tokens = "100000/60"                              # so many in so many seconds, of prompts and answers
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterhub.digest import is_hex
from adapterhub.http_server.limits import Windows
from adapterhub.ref import RefError
from adapterhub.serve import names
from adapterhub.serve.names import Allowed
from adapterhub_converters.containers import json_file, toml_file
from adapterhub_converters.errors import UsageError

_TARGETS, _RULES, _MOST = 16, 64, 10_000
_NAME = 256  # characters


@dataclass(frozen=True, slots=True)
class Target:
    """What a route leads to: refs or blends, each with its share of the requests."""

    shares: tuple[tuple[str, float], ...]

    def chosen(self, salt: str) -> str:
        """One of them by its share, always the same for the same `salt`; by chance for an empty one."""
        if len(self.shares) == 1:
            return self.shares[0][0]
        digest = hashlib.sha256(salt.encode("utf-8", "surrogatepass")).digest()
        at = (int.from_bytes(digest[:8]) / 2**64 if salt else random.random()) * sum(share for _, share in self.shares)  # noqa: S311
        for text, share in self.shares:
            at -= share
            if at < 0:
                return text
        return self.shares[-1][0]


@dataclass(frozen=True, slots=True)
class Rule:
    """Another target for requests that have a header, a user, or a key; empty texts fit all."""

    to: Target
    header: tuple[str, str] = ("", "")
    user: str = ""
    key: str = ""

    def fits(self, headers: Mapping[str, str], user: str, key: str) -> bool:
        """Return whether a request is meant."""
        name, value = self.header
        named = not name or headers.get(name) == value
        return named and self.user in ("", user) and self.key in ("", key)


@dataclass(frozen=True, slots=True)
class Route:
    """A name of the gateway's own."""

    name: str
    to: Target
    rules: tuple[Rule, ...] = ()

    def chosen(self, headers: Mapping[str, str], user: str, key: str) -> str:
        """The ref or blend for a request; the same user of the same key stays with one of the shares."""
        target = next((rule.to for rule in self.rules if rule.fits(headers, user, key)), self.to)
        return target.chosen(f"{self.name}\0{key}\0{user}" if user else "")


@dataclass(slots=True)
class Key:
    """Somebody who may ask.

    Attributes:
        sha256: Of the key itself, in hexadecimal digits.
        windows: Counts their requests; None for no limit.
        most: Requests at once; 0 for no limit.
        tokens: Counts the tokens of their prompts and answers; None for no limit.
    """

    name: str
    sha256: str = ""
    allowed: Allowed = field(default_factory=Allowed)
    windows: Windows | None = None
    most: int = 0
    tokens: Windows | None = None


@dataclass(frozen=True, slots=True)
class Routes:
    """What a file has."""

    routes: Mapping[str, Route] = field(default_factory=dict)
    keys: Mapping[str, Key] = field(default_factory=dict)

    def key_of(self, secret: str) -> Key | None:
        """Who has a key. Digests are compared: the time that it takes tells nothing of a key that is not known already."""
        return self.keys.get(hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest())


def read(path: Path, before: Routes | None = None) -> Routes:
    """Read a file; keys of the same name and limits go on counting where `before` was.

    Raises:
        UsageError: It is malformed, with the place; or it has no keys, and `before` had some.
    """
    where = str(path)
    document = toml_file.parse(json_file.read_text(path, toml_file.MAX_TOML), where)
    _check_names(document, ("routes", "keys"), where)
    routes = {name: _route(name, table, where) for name, table in _tables(document, "routes", where).items()}
    keys = [_key(name, table, where) for name, table in _tables(document, "keys", where).items()]
    counted = {key.name: key for key in before.keys.values()} if before else {}
    for key in keys:
        if old := counted.get(key.name):
            key.windows, key.tokens = _going_on(key.windows, old.windows), _going_on(key.tokens, old.tokens)
    if counted and not keys:  # a file that is just being written; nobody opens a server to all by that
        raise _invalid(f"{where}: keys", "all keys were removed", "Start the gateway anew to answer without keys")
    found = {key.sha256: key for key in keys}
    if len(found) < len(keys):
        raise _invalid(f"{where}: keys", "two names have the same key", "Give each its own")
    return Routes(routes, found)


def _invalid(where: str, what: str, hint: str = "") -> UsageError:
    return UsageError(where, what, hint, code="invalid-config")


def _going_on(new: Windows | None, old: Windows | None) -> Windows | None:
    """The old count for the same limit."""
    return old if new and old and (new.most, new.seconds) == (old.most, old.seconds) else new


def _tables(document: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    found = document.get(name, {})
    if not isinstance(found, dict) or not all(isinstance(table, dict) for table in found.values()):
        raise _invalid(f"{where}: {name}", "not a table of tables", f"Write [{name}.NAME]")
    if len(found) > _MOST:
        raise _invalid(f"{where}: {name}", f"more than {_MOST:,}")
    return found


def _check_names(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in table:
        if name not in known:
            raise _invalid(f"{where}: {name[:80]}", "unknown", f"There are {', '.join(known)}")


def _route(name: str, table: Mapping[str, Any], where: str) -> Route:
    place = f"{where}: routes.{name[:80]}"
    if not 0 < len(name) <= _NAME or not name.isprintable() or set(name) & set(", "):
        raise _invalid(place, "a name has no comma and no space, and 1 to 256 characters")
    _check_names(table, ("to", "when"), place)
    rules = table.get("when", [])
    if not isinstance(rules, list) or len(rules) > _RULES or not all(isinstance(rule, dict) for rule in rules):
        raise _invalid(f"{place}.when", f"not a list of at most {_RULES} tables", f"Write [[routes.{name}.when]]")
    return Route(name, _target(table, place), tuple(_rule(rule, f"{place}.when[{at}]") for at, rule in enumerate(rules)))


def _rule(table: Mapping[str, Any], place: str) -> Rule:
    _check_names(table, ("to", "header", "user", "key"), place)
    name, colon, value = _text(table, "header", place).partition(":")
    if name and not colon:
        raise _invalid(f"{place}.header", "not a header with its value", 'Write it like "x-stage: beta"')
    rule = Rule(
        _target(table, place), (name.strip().lower(), value.strip()), _text(table, "user", place), _text(table, "key", place)
    )
    if not (rule.header[0] or rule.user or rule.key):
        raise _invalid(place, "matches every request", "Name a header, a user or a key")
    return rule


def _target(table: Mapping[str, Any], place: str) -> Target:
    to = table.get("to")
    shares = {to: 1} if isinstance(to, str) else to
    if not isinstance(shares, dict) or not 0 < len(shares) <= _TARGETS:
        raise _invalid(f"{place}.to", "not a ref, and not shares of refs", 'Write to = "team/legal:prod"')
    for text, share in shares.items():
        try:
            names.parse(text)
        except RefError as error:
            raise _invalid(f"{place}.to", f"{error.where}: {error.what}", error.hint) from error
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 10**6:
            raise _invalid(f"{place}.to", f"the share of {text} is not a number from 0 to 1,000,000")
    if not sum(shares.values()):
        raise _invalid(f"{place}.to", "all shares are 0")
    return Target(tuple((text, float(share)) for text, share in shares.items()))


def _text(table: Mapping[str, Any], name: str, place: str) -> str:
    found = table.get(name, "")
    if not isinstance(found, str) or len(found) > 1000:
        raise _invalid(f"{place}.{name}", "not a text")
    return found


def _key(name: str, table: Mapping[str, Any], where: str) -> Key:
    place = f"{where}: keys.{name[:80]}"
    _check_names(table, ("sha256", "adapters", "requests", "running", "tokens"), place)
    sha256 = _text(table, "sha256", place).removeprefix("sha256:").lower()
    if not is_hex(sha256):
        raise _invalid(f"{place}.sha256", "not the SHA-256 of a key, 64 hexadecimal digits")
    patterns = table.get("adapters", [])
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise _invalid(f"{place}.adapters", "not a list of names")
    most = table.get("running", 0)
    if isinstance(most, bool) or not isinstance(most, int) or not 0 <= most <= 10**6:
        raise _invalid(f"{place}.running", "not a number of requests")
    if "adapters" in table and not any(pattern.strip(", ") for pattern in patterns):
        raise _invalid(f"{place}.adapters", "names nothing", "Leave it out to allow all, or remove the key")
    requests, tokens = (_limit(table, kind, place) for kind in ("requests", "tokens"))
    return Key(name, sha256, Allowed.of(patterns), requests, most, tokens)


def _limit(table: Mapping[str, Any], kind: str, place: str) -> Windows | None:
    text = _text(table, kind, place)
    if not text:
        return None
    count, _, seconds = text.partition("/")
    if not all(number.isascii() and number.isdigit() and 0 < len(number) < 10 and int(number) for number in (count, seconds)):
        raise _invalid(f"{place}.{kind}", f"{text[:40]!r} is not a limit", f'Write it like "600/60", {kind} and seconds')
    return Windows(int(count), int(seconds))

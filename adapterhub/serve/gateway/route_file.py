"""The routes and keys of a gateway, a TOML file.

[routes.legal]                                    # a name that requests may ask for
to = "team/legal:prod"                            # or shares: { "team/legal:v7" = 90, "team/legal:v8" = 10 }
warm = true                                       # not ready before the targets are loaded
pin = true                                        # warm, and never displaced by other versions

candidate = "team/legal:v8"                       # a rollout, and a shadow: `rollout_plan`

[[routes.legal.when]]                             # the first that matches decides
header = "x-stage: beta"                          # or user = "ada", or key = "research"
to = "team/legal:beta"

[keys.research]                                   # with keys, every request needs one
sha256 = "…"                                      # of the key
adapters = ["legal", "team/*"]                    # the names that it may ask for; all if absent
requests = "600/60"                               # so many in so many seconds
running = 8                                       # so many at once
tokens = "100000/60"                              # so many in so many seconds, of prompts and answers
tokens_per_day = 1_000_000                        # in a day of the calendar (UTC)
tokens_per_month = 20_000_000
priority = -1                                     # lower numbers are answered first, by engines that have priorities

[[engines]]                                       # one more engine, beside those of --engine-url
url = "http://10.0.0.7:8000"
name = "left"                                     # in logs, metrics and /ready; its host and port if absent
weight = 2                                        # twice as many requests as one with 1
key_variable = "LEFT_KEY"                         # the environment variable that has its key
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from adapterhub.digest import is_hex
from adapterhub.http_server.rate_windows import Windows
from adapterhub.ref import Ref, RefError
from adapterhub.serve import model_names
from adapterhub.serve.engines.pooled_engine import EngineAddress, address_of, check_distinct
from adapterhub.serve.model_names import AllowedNames
from adapterhub_converters.containers import json_file, toml_file
from adapterhub_converters.errors import UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from . import calendar_budgets, rollout_plan
from .calendar_budgets import CalendarBudget
from .rollout_plan import PlanError, RolloutPlan, ShadowPlan, Stickiness

_MAX_TARGETS, _MAX_RULES, _MAX_TABLES, _MAX_ENGINES = 16, 64, 10_000, 256
_MAX_NAME = 256  # characters
_MAX_PRIORITY = 1_000_000


@dataclass(frozen=True, slots=True)
class Target:
    """The target of a route: refs or blends, each with its share of the requests."""

    shares: tuple[tuple[str, float], ...]

    def choose(self, salt: str) -> str:
        """Choose one by its share: always the same for the same `salt`, or at random if that is empty."""
        if len(self.shares) == 1:
            return self.shares[0][0]
        # A hash instead of a stored assignment: every gateway makes the same choice, also after a restart.
        digest = hashlib.sha256(salt.encode("utf-8", "surrogatepass")).digest()
        remaining = (int.from_bytes(digest[:8]) / 2**64 if salt else random.random()) * sum(share for _, share in self.shares)  # noqa: S311
        for text, share in self.shares:
            remaining -= share
            if remaining < 0:
                return text
        return self.shares[-1][0]


@dataclass(frozen=True, slots=True)
class Rule:
    """Another target for requests with a certain header, user, or key; empty texts match all."""

    to: Target
    header: tuple[str, str] = ("", "")
    user: str = ""
    key: str = ""

    def fits(self, headers: Mapping[str, str], user: str, key: str) -> bool:
        """Return whether the rule applies to a request."""
        name, value = self.header
        header_fits = not name or headers.get(name) == value
        return header_fits and self.user in ("", user) and self.key in ("", key)


@dataclass(frozen=True, slots=True)
class Route:
    """A name of the gateway's own.

    Attributes:
        warm: Whether its targets are loaded before the gateway is ready.
        pin: Whether they stay in the engine; such a route is warm too.
        rollout: What replaces its target step by step; None for nothing.
        shadow: What gets copies of its requests; None for nothing.
        stickiness: What keeps a client with one arm.
    """

    name: str
    to: Target
    rules: tuple[Rule, ...] = ()
    warm: bool = False
    pin: bool = False
    rollout: RolloutPlan | None = None
    shadow: ShadowPlan | None = None
    stickiness: Stickiness = field(default_factory=Stickiness)

    def refs(self) -> Iterator[Ref]:
        """Yield the refs of all targets."""
        for target in (self.to, *(rule.to for rule in self.rules)):
            for text, _ in target.shares:
                yield from (part.ref for part in model_names.parse(text))
        if self.rollout is not None:
            yield self.rollout.candidate

    @property
    def stable_ref(self) -> Ref:
        """The ref that the candidate of the route's rollout is compared with."""
        return model_names.parse(self.to.shares[0][0])[0].ref

    def special_target(self, headers: Mapping[str, str], user: str, key: str) -> Target | None:
        """Return the target of the first rule that fits a request; None if its own target answers."""
        return next((rule.to for rule in self.rules if rule.fits(headers, user, key)), None)

    def choose(self, headers: Mapping[str, str], identifiers: Mapping[str, str], key: str) -> str:
        """Return the ref or blend for a request without a rollout: the same for the same client of the same key."""
        target = self.special_target(headers, identifiers.get("user", ""), key) or self.to
        unit = self.stickiness.unit_of(headers, identifiers)
        return target.choose(f"{self.name}\0{key}\0{unit}" if unit else "")


@dataclass(slots=True)
class Key:
    """A client that may ask.

    Attributes:
        sha256: The digest of the key itself, in hexadecimal digits.
        windows: Counts the requests; None for no limit.
        max_running: Requests at once; 0 for no limit.
        tokens: Counts the tokens of prompts and answers; None for no limit.
        budget: The tokens of a day and of a month; None for no limit.
        priority: Lower numbers are answered first.
    """

    name: str
    sha256: str = ""
    allowed: AllowedNames = field(default_factory=AllowedNames)
    windows: Windows | None = None
    max_running: int = 0
    tokens: Windows | None = None
    budget: CalendarBudget | None = None
    priority: int = 0

    @property
    def has_token_limits(self) -> bool:
        """Whether its tokens are limited, in a window or in days and months."""
        return bool(self.tokens or self.budget)


@dataclass(frozen=True, slots=True)
class Routes:
    """The contents of a route file."""

    routes: Mapping[str, Route] = field(default_factory=dict)
    keys: Mapping[str, Key] = field(default_factory=dict)
    engines: tuple[EngineAddress, ...] = ()

    @property
    def has_calendar_budgets(self) -> bool:
        """Whether a key has a limit of tokens in a day or a month."""
        return any(key.budget for key in self.keys.values())

    def key_of(self, secret: str) -> Key | None:
        """Return the client with a key; None if it is unknown.

        Digests are looked up, so that the time it takes reveals nothing about a key that is not already known.
        """
        return self.keys.get(hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest())


def read(path: Path, before: Routes | None = None) -> Routes:
    """Read a file; keys with the same name and limits keep the counts of `before`.

    Raises:
        UsageError: It is malformed, with the place; or it has no keys, but `before` had some.
    """
    location = str(path)
    document = toml_file.parse(json_file.read_text(path, toml_file.MAX_TOML), location)
    _check_names(document, ("routes", "keys", "engines"), location)
    routes = {name: _route(name, table, location) for name, table in _tables(document, "routes", location).items()}
    keys = [_key(name, table, location) for name, table in _tables(document, "keys", location).items()]
    # By name, so that a client that replaces its key keeps its count.
    earlier = {key.name: key for key in before.keys.values()} if before else {}
    for key in keys:
        if old := earlier.get(key.name):
            key.windows, key.tokens = _continued_count(key.windows, old.windows), _continued_count(key.tokens, old.tokens)
    if earlier and not keys:  # perhaps the file is just being written; that must not open a server to everybody
        raise _invalid(f"{location}: keys", "all keys were removed", "Restart the gateway to answer without keys")
    keys_by_digest = {key.sha256: key for key in keys}
    if len(keys_by_digest) < len(keys):
        raise _invalid(f"{location}: keys", "two names have the same key", "Give each its own")
    return Routes(routes, keys_by_digest, _engines(document, location))


def _invalid(location: str, problem: str, hint: str = "") -> UsageError:
    """Return the error for an invalid file."""
    return UsageError(location, problem, hint, code="invalid-config")


def _continued_count(new: Windows | None, old: Windows | None) -> Windows | None:
    """Return the old count if the limit is the same, otherwise the new one."""
    return old if new and old and (new.limit, new.seconds) == (old.limit, old.seconds) else new


def _tables(document: Mapping[str, Any], name: str, location: str) -> dict[str, Any]:
    """Return a table of tables; empty if it is missing."""
    tables = document.get(name, {})
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise _invalid(f"{location}: {name}", "not a table of tables", f"Write [{name}.NAME]")
    if len(tables) > _MAX_TABLES:
        raise _invalid(f"{location}: {name}", f"more than {_MAX_TABLES:,}")
    return tables


def _check_names(table: Mapping[str, Any], allowed: Sequence[str], location: str) -> None:
    """Raise UsageError for a name that is not among the allowed ones."""
    for name in table:
        if name not in allowed:
            raise _invalid(f"{location}: {name[:80]}", "unknown", f"There are {', '.join(allowed)}")


def _route(name: str, table: Mapping[str, Any], location: str) -> Route:
    """Parse a route."""
    place = f"{location}: routes.{name[:80]}"
    if not 0 < len(name) <= _MAX_NAME or not name.isprintable() or set(name) & set(", "):
        raise _invalid(place, "a name has no comma and no space, and 1 to 256 characters")
    _check_names(table, ("to", "when", "warm", "pin", *rollout_plan.NAMES), place)
    rules = table.get("when", [])
    if not isinstance(rules, list) or len(rules) > _MAX_RULES or not all(isinstance(rule, dict) for rule in rules):
        raise _invalid(f"{place}.when", f"not a list of at most {_MAX_RULES} tables", f"Write [[routes.{name}.when]]")
    parsed_rules = tuple(_rule(rule, f"{place}.when[{at}]") for at, rule in enumerate(rules))
    target, warm, pin = _target(table, place), _flag(table, "warm", place), _flag(table, "pin", place)
    try:
        plans = rollout_plan.read_rollout(table), rollout_plan.read_shadow(table), rollout_plan.read_stickiness(table)
    except PlanError as error:
        raise _invalid(f"{place}.{error.name}", error.problem, error.hint) from error
    return Route(name, target, parsed_rules, warm, pin, *plans)


def _rule(table: Mapping[str, Any], place: str) -> Rule:
    """Parse a rule of a route."""
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


def _engines(document: Mapping[str, Any], location: str) -> tuple[EngineAddress, ...]:
    """Parse the engines."""
    tables = document.get("engines", [])
    if not isinstance(tables, list) or len(tables) > _MAX_ENGINES or not all(isinstance(table, dict) for table in tables):
        raise _invalid(f"{location}: engines", f"not a list of at most {_MAX_ENGINES} tables", "Write [[engines]]")
    addresses = tuple(_engine(table, f"{location}: engines[{number}]") for number, table in enumerate(tables))
    check_distinct(addresses, f"{location}: engines")
    return addresses


def _engine(table: Mapping[str, Any], place: str) -> EngineAddress:
    """Parse an engine."""
    _check_names(table, ("url", "name", "weight", "key_variable"), place)
    url, name = _text(table, "url", place), _text(table, "name", place)
    if not url.startswith(("http://", "https://")):
        raise _invalid(f"{place}.url", "not the URL of a server", "Write it like http://127.0.0.1:8001")
    if not name.isprintable() or len(name) > _MAX_NAME:
        raise _invalid(f"{place}.name", f"a name has at most {_MAX_NAME} characters, all printable")
    weight = table.get("weight", 1)
    if not json_file.is_number(weight) or not 0.001 <= weight <= 1000:
        raise _invalid(f"{place}.weight", "not a number from 0.001 to 1,000", "To stop using an engine, remove its table")
    return address_of(url, name, float(weight), _text(table, "key_variable", place))


def _target(table: Mapping[str, Any], place: str) -> Target:
    """Parse a target: a ref or blend, or several with their shares."""
    to = table.get("to")
    shares = {to: 1} if isinstance(to, str) else to
    if not isinstance(shares, dict) or not 0 < len(shares) <= _MAX_TARGETS:
        raise _invalid(f"{place}.to", "not a ref, and not shares of refs", 'Write to = "team/legal:prod"')
    for text, share in shares.items():
        try:
            model_names.parse(text)
        except RefError as error:
            raise _invalid(f"{place}.to", f"{error.where}: {error.what}", error.hint) from error
        if not json_file.is_number(share) or not 0 <= share <= 10**6:
            raise _invalid(f"{place}.to", f"the share of {text} is not a number from 0 to 1,000,000")
    if not sum(shares.values()):
        raise _invalid(f"{place}.to", "all shares are 0")
    return Target(tuple((text, float(share)) for text, share in shares.items()))


def _flag(table: Mapping[str, Any], name: str, place: str) -> bool:
    """Return a truth value; False if it is missing."""
    value = table.get(name, False)
    if not isinstance(value, bool):
        raise _invalid(f"{place}.{name}", "neither true nor false")
    return value


def _text(table: Mapping[str, Any], name: str, place: str) -> str:
    """Return a text of bounded length; empty if it is missing."""
    text = table.get(name, "")
    if not isinstance(text, str) or len(text) > 1000:
        raise _invalid(f"{place}.{name}", "not a text")
    return text


def _key(name: str, table: Mapping[str, Any], location: str) -> Key:
    """Parse a key."""
    place = f"{location}: keys.{name[:80]}"
    _check_names(table, ("sha256", "adapters", "requests", "running", "tokens", *calendar_budgets.NAMES, "priority"), place)
    sha256 = _text(table, "sha256", place).removeprefix("sha256:").lower()
    if not is_hex(sha256):
        raise _invalid(f"{place}.sha256", "not the SHA-256 of a key, 64 hexadecimal digits")
    patterns = table.get("adapters", [])
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise _invalid(f"{place}.adapters", "not a list of names")
    max_running = table.get("running", 0)
    if not json_file.is_integer(max_running) or not 0 <= max_running <= 10**6:
        raise _invalid(f"{place}.running", "not a number of requests")
    if "adapters" in table and not any(pattern.strip(", ") for pattern in patterns):
        raise _invalid(f"{place}.adapters", "names nothing", "Leave it out to allow all, or remove the key")
    requests, tokens = (_limit(table, kind, place) for kind in ("requests", "tokens"))
    try:
        budget = CalendarBudget.from_table(table)
    except ValueError as error:
        raise _invalid(f"{place}.{error}", "not a number of tokens", f"Write it like {error} = 1_000_000") from error
    priority = table.get("priority", 0)
    if not json_file.is_integer(priority) or abs(priority) > _MAX_PRIORITY:
        raise _invalid(f"{place}.priority", f"not a whole number from -{_MAX_PRIORITY:,} to {_MAX_PRIORITY:,}")
    return Key(name, sha256, AllowedNames.from_patterns(patterns), requests, max_running, tokens, budget, priority)


def _limit(table: Mapping[str, Any], kind: str, place: str) -> Windows | None:
    """Parse a limit such as `600/60`; None if it is missing."""
    text = _text(table, kind, place)
    if not text:
        return None
    count, _, seconds = text.partition("/")
    if not all(number.isascii() and number.isdigit() and 0 < len(number) < 10 and int(number) for number in (count, seconds)):
        raise _invalid(f"{place}.{kind}", f"{text[:40]!r} is not a limit", f'Write it like "600/60", {kind} and seconds')
    return Windows(int(count), int(seconds))

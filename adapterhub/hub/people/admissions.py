"""Who may sign in with an account at an OpenID Connect provider, and as which account of the hub.

Nobody may until the operator admits them by a rule, or links their identity to an account. A rule is an issuer and some claims,
and gives a role or none. An identity is an issuer and a subject: a name or an e-mail address may belong to somebody else next
year. Who comes for the first time gets a new account, whose name nobody has or had here, and no namespace either: an account
owns the namespace of its name.
"""

from __future__ import annotations

import itertools
import json
import secrets
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapterhub.hub.database import HubDatabase
from adapterhub.ref import is_name
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import NotFoundError, RefusedError, UsageError

from . import accounts, id_tokens, tokens
from .accounts import EVERYWHERE, ROLES
from .id_tokens import IdToken

_EMAIL = "email"
_RESERVED = ("anonymous", "mirror")  # what logs call those who have no account
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789")
_LONGEST_NAME, _LONGEST_SUBJECT = 60, 255  # characters


@dataclass(frozen=True, slots=True)
class Admission:
    """A rule: whom of an issuer it admits, and the role that they have in a namespace; an empty role is none.

    Attributes:
        claims: What all must hold: claim to value; none admits everybody whom the issuer knows.
    """

    id: int
    issuer: str
    claims: Mapping[str, str]
    namespace: str
    role: str


def add(
    database: HubDatabase,
    issuer: str,
    claims: Mapping[str, str],
    *,
    everybody: bool = False,
    namespace: str = EVERYWHERE,
    role: str = "",
) -> int:
    """Admit those whose claims have all of some values; return the id of the rule.

    Args:
        database: Where the rule goes.
        issuer: Its URL.
        claims: A claim that is a list must contain the value. Of `email`, which must be verified, a value like `@example.org`
            is any address there.
        everybody: Admit all whom the issuer knows, without `claims`.
        namespace: Where the role holds.
        role: One of ROLES, or empty for none besides that in their own namespaces.

    Raises:
        UsageError: Neither claims nor `everybody`, or both; a role, a namespace or an issuer that is none.
    """
    id_tokens.check_issuer(issuer)
    if role:
        accounts.check_role(role)
    if namespace != EVERYWHERE:
        accounts.check_namespace(namespace)
    if bool(claims) == everybody:
        what = "admits everybody whom the issuer knows" if everybody else "no claim tells who is meant"
        raise UsageError(issuer, what, "Name a claim, or admit everybody")
    sql = "INSERT INTO admissions (issuer, claims, namespace, role) VALUES (?, ?, ?, ?) RETURNING id"
    with database.transaction():
        return int(database.select(sql, issuer, json.dumps(dict(claims)), namespace, role)[0][0])


def listed(database: HubDatabase) -> list[Admission]:
    """Return the rules, by issuer."""
    rows = database.select("SELECT id, issuer, claims, namespace, role FROM admissions ORDER BY issuer, id")
    return [Admission(row[0], row[1], json_file.parse_object(row[2], "hub.db"), row[3], row[4]) for row in rows]


def remove(database: HubDatabase, ident: int) -> None:
    """Remove a rule, and the roles that it gave. NotFoundError without it."""
    with database.transaction():
        if not database.execute("DELETE FROM admissions WHERE id = ?", ident):
            raise NotFoundError(str(ident), "no such rule", "List the rules", code="no-such-number", kind="admission")
        database.execute("DELETE FROM members WHERE admission = ?", ident)


def link(database: HubDatabase, account: str, issuer: str, subject: str) -> None:
    """Let an identity sign in as an account, whatever the rules say."""
    id_tokens.check_issuer(issuer)
    with database.transaction():
        accounts.check_account(database, account)
        sql = (
            "INSERT INTO identities VALUES (?, ?, ?, 1)"
            " ON CONFLICT (issuer, subject) DO UPDATE SET account = excluded.account, linked = 1"
        )
        database.execute(sql, issuer, _subject(subject), account)


def enter(database: HubDatabase, who: IdToken, taken: Collection[str], *, mirrors: bool = False) -> str:
    """The account of somebody who has logged in at their issuer, made if need be, with the roles that the rules now give.

    Args:
        database: Where accounts are.
        who: What the issuer says of them.
        taken: Namespaces that are in use, besides those of the database.
        mirrors: The hub mirrors another one, where any name may be a namespace: that of a new account then ends in a number
            that nobody chooses.

    Raises:
        RefusedError: No rule admits them, or their account was removed.
    """
    subject = _subject(who.claims.get("sub"))
    with database.transaction():
        sql = (
            "SELECT i.account, i.linked, a.removed FROM identities i JOIN accounts a ON a.name = i.account"
            " WHERE i.issuer = ? AND i.subject = ?"
        )
        rows = database.select(sql, who.issuer, subject)
        account, linked, removed = rows[0] if rows else ("", 0, None)
        rules = [one for one in listed(database) if one.issuer == who.issuer and _admits(one, who.claims)]
        admitted = removed is None and bool(linked or rules)
        if admitted and not account:
            account = _free_name(who.claims, {*taken, *_names_in_use(database)}, mirrors=mirrors)
            accounts.ensure(database, account)
            database.execute("INSERT INTO identities VALUES (?, ?, ?, 0)", who.issuer, subject, account)
        if account:
            _give(database, account, rules if admitted else ())
        if account and not admitted:
            tokens.revoke_all(database, account, (tokens.BROWSER, tokens.DEVICE))
    if removed is not None:
        raise RefusedError(account, "this account was removed", "Ask the operator of the hub")
    if not admitted:
        what = f"no rule of this hub admits you: you are {subject} at {who.issuer}"
        raise RefusedError("sign-in", what, "Ask the operator of the hub")
    return str(account)


def _subject(value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST_SUBJECT or not value.isprintable():
        raise RefusedError("id token", "its claim sub is not a subject")
    return value


def _give(database: HubDatabase, account: str, rules: Sequence[Admission]) -> None:
    """Have an account the roles of rules, in place of those of earlier rules; what the operator gave it stays."""
    database.execute("DELETE FROM members WHERE account = ? AND admission IS NOT NULL", account)
    for one in sorted((one for one in rules if one.role), key=lambda one: -ROLES.index(one.role)):
        sql = "INSERT INTO members (namespace, account, role, admission) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING"
        database.execute(sql, one.namespace, account, one.role, one.id)


# ---- claims


def _admits(rule: Admission, claims: Mapping[str, Any]) -> bool:
    return all(_email_is(claims, value) if name == _EMAIL else _has(claims, name, value) for name, value in rule.claims.items())


def _has(claims: Mapping[str, Any], name: str, value: str) -> bool:
    found = claims.get(name)
    return any(id_tokens.is_value(one, value) for one in (found if isinstance(found, list) else [found]))


def _email_is(claims: Mapping[str, Any], value: str) -> bool:
    """Whether an address that the issuer has verified is `value`, or in the domain of a value like `@example.org`."""
    email = claims.get(_EMAIL)
    if claims.get("email_verified") not in (True, "true") or not isinstance(email, str) or not email.isascii():
        return False
    _, at, domain = email.lower().rpartition("@")
    return value.lower() in (email.lower(), at + domain)


# ---- names


def _free_name(claims: Mapping[str, Any], taken: Collection[str], *, mirrors: bool) -> str:
    """A name that nobody has, as near as may be to what they are called elsewhere."""
    wanted = next(filter(None, (_name_of(claims.get(key)) for key in ("preferred_username", _EMAIL))), "person")
    plain = itertools.chain([wanted], (f"{wanted}-{number}" for number in itertools.count(2)))
    names = (f"{wanted}-{secrets.token_hex(4)}" for _ in itertools.count()) if mirrors else plain
    return next(name for name in names if name not in taken and name not in _RESERVED)


def _name_of(text: object) -> str:
    """What can be a name of `ada`, `Ada Lovelace` or `ada@example.org`; empty for nothing."""
    if not isinstance(text, str):
        return ""
    plain = unicodedata.normalize("NFKD", text[:1000].partition("@")[0]).encode("ascii", "ignore").decode().lower()
    words = "".join(letter if letter in _LETTERS else " " for letter in plain)[:_LONGEST_NAME].split()
    name = "-".join(words)
    return name if is_name(f"{name}/x") else ""


def _names_in_use(database: HubDatabase) -> set[str]:
    """Every namespace that is somebody's, or that the operator has said anything about."""
    sql = "SELECT name FROM namespaces UNION SELECT namespace FROM webhooks"
    return accounts.taken(database) | {name for (name,) in database.select(sql)}

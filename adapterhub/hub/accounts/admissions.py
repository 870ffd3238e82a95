"""Who may sign in with an account at an OpenID Connect provider, and as which account of the hub.

Nobody may until the operator admits them by a rule, or links their identity to an account. A rule is an issuer and some claims,
and gives a role or none. An identity is an issuer and a subject: a name or an e-mail address may belong to somebody else next
year. The first sign-in creates a new account, with a name that no account or namespace has or had here, because an account owns
the namespace of its name.
"""

from __future__ import annotations

import itertools
import json
import secrets
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from adapterhub.hub.hub_database import HubDatabase
from adapterhub.ref import is_name
from adapterhub.sqlite_file import of_one_snapshot
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import NotFoundError, RefusedError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from . import access_tokens, accounts, id_tokens
from .accounts import EVERYWHERE, ROLES
from .id_tokens import IdToken

_EMAIL = "email"
_KINDS_OF_PEOPLE = (access_tokens.BROWSER, access_tokens.DEVICE, access_tokens.PERSONAL)
_RESERVED = ("anonymous", "mirror")  # names that logs use for clients without an account
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789")
_MAX_NAME, _MAX_SUBJECT = 60, 255  # characters


@dataclass(frozen=True, slots=True)
class Admission:
    """A rule: whom of an issuer it admits, and their role in a namespace; an empty role gives none.

    Attributes:
        claims: Claims that must all match, name to value; without any, everybody at the issuer is admitted.
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
    """Admit people whose claims match; return the id of the rule.

    Args:
        database: The database the rule is added to.
        issuer: The issuer's URL.
        claims: Claim to value; a claim that is a list must contain the value. For `email`, which must be verified, a value such
            as `@example.org` matches any address of that domain.
        everybody: Admit everybody at the issuer, without `claims`.
        namespace: The namespace in which they get the role.
        role: One of ROLES, or empty for no role besides the one in their own namespace.

    Raises:
        UsageError: Neither claims nor `everybody` are given, or both; or a role, namespace or issuer is invalid.
    """
    id_tokens.check_issuer(issuer)
    if role:
        accounts.check_role(role)
    if namespace != EVERYWHERE:
        accounts.check_namespace(namespace)
    if bool(claims) == everybody:
        problem = "everybody is admitted, so the claims have no effect" if everybody else "no claim says who is admitted"
        raise UsageError(issuer, problem, "Name a claim, or admit everybody")
    sql = "INSERT INTO admissions (issuer, claims, namespace, role) VALUES (?, ?, ?, ?) RETURNING id"
    with database.transaction():
        return int(database.select(sql, issuer, json.dumps(dict(claims)), namespace, role)[0][0])


def list_rules(database: HubDatabase) -> list[Admission]:
    """Return the rules, by issuer."""
    rows = database.select("SELECT id, issuer, claims, namespace, role FROM admissions ORDER BY issuer, id")
    return [Admission(row[0], row[1], json_file.parse_object(row[2], "hub.db"), row[3], row[4]) for row in rows]


def remove(database: HubDatabase, ident: int) -> None:
    """Remove a rule, and the roles it gave.

    Raises:
        NotFoundError: There is no such rule.
    """
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
            "INSERT INTO identities (issuer, subject, account, linked) VALUES (?, ?, ?, 1)"
            " ON CONFLICT (issuer, subject) DO UPDATE SET account = excluded.account, linked = 1"
        )
        database.execute(sql, issuer, _subject(subject), account)


def admit(database: HubDatabase, id_token: IdToken, taken_names: Collection[str], *, mirrors: bool = False) -> str:
    """Return the account of a person who logged in at their issuer, created if needed, with the roles the rules now give.

    Args:
        database: The database with the accounts.
        id_token: The verified ID token.
        taken_names: Namespaces in use, besides those in the database.
        mirrors: Whether the hub answers with what another one has, where any name may be a namespace: then the name of a new
            account ends in random digits that nobody can choose.

    Raises:
        RefusedError: No rule admits them, or their account was removed.
    """
    subject = _subject(id_token.claims.get("sub"))
    with database.transaction():
        sql = (
            "SELECT i.account, i.linked, a.removed, a.disabled FROM identities i JOIN accounts a ON a.name = i.account"
            " WHERE i.issuer = ? AND i.subject = ?"
        )
        rows = database.select(sql, id_token.issuer, subject)
        account, linked, removed, disabled = rows[0] if rows else ("", 0, None, None)
        rules = [rule for rule in list_rules(database) if rule.issuer == id_token.issuer and _admits(rule, id_token.claims)]
        admitted = removed is None and bool(linked or rules)
        if admitted and not account:
            account = _free_name(id_token.claims, {*taken_names, *_names_in_use(database)}, mirrors=mirrors)
            accounts.ensure_account(database, account)
            sql = "INSERT INTO identities (issuer, subject, account, linked) VALUES (?, ?, ?, 0)"
            database.execute(sql, id_token.issuer, subject, account)
        if account:
            _set_rule_roles(database, account, rules if admitted else ())
        # No longer admitted: end the sessions and devices that signed in this way, and the tokens made in such a session.
        if account and not admitted:
            access_tokens.revoke_all(database, account, _KINDS_OF_PEOPLE)
    if removed is not None or disabled is not None:
        problem = f"this account was {'removed' if removed is not None else 'disabled'}"
        raise RefusedError(account, problem, "Ask the operator of the hub")
    if not admitted:
        problem = f"no rule of this hub admits you: you are {subject} at {id_token.issuer}"
        raise RefusedError("sign-in", problem, "Ask the operator of the hub")
    return str(account)


def _subject(value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_SUBJECT or not value.isprintable():
        raise RefusedError("id token", "its claim sub is not a subject")
    return value


def _set_rule_roles(database: HubDatabase, account: str, rules: Sequence[Admission]) -> None:
    """Give an account the roles of rules, in place of those of earlier rules; roles set by the operator stay."""
    database.execute("DELETE FROM members WHERE account = ? AND admission IS NOT NULL", account)
    for rule in sorted((rule for rule in rules if rule.role), key=lambda rule: -ROLES.index(rule.role)):
        sql = "INSERT INTO members (namespace, account, role, admission) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING"
        database.execute(sql, rule.namespace, account, rule.role, rule.id)


# ---- claims


def _admits(rule: Admission, claims: Mapping[str, Any]) -> bool:
    return all(
        _email_matches(claims, value) if name == _EMAIL else _has_claim(claims, name, value)
        for name, value in rule.claims.items()
    )


def _has_claim(claims: Mapping[str, Any], name: str, value: str) -> bool:
    claim = claims.get(name)
    return any(id_tokens.claim_equals(item, value) for item in (claim if isinstance(claim, list) else [claim]))


def _email_matches(claims: Mapping[str, Any], value: str) -> bool:
    """Return whether a verified address is `value`, or in its domain if that is like `@example.org`."""
    email = claims.get(_EMAIL)
    if claims.get("email_verified") not in (True, "true") or not isinstance(email, str) or not email.isascii():
        return False
    _, at, domain = email.lower().rpartition("@")
    return value.lower() in (email.lower(), at + domain)


# ---- names


def _free_name(claims: Mapping[str, Any], taken_names: Collection[str], *, mirrors: bool) -> str:
    """Return an unused name, as close as possible to the person's name at the issuer."""
    preferred = next(filter(None, (_name_of(claims.get(key)) for key in ("preferred_username", _EMAIL))), "person")
    plain = itertools.chain([preferred], (f"{preferred}-{number}" for number in itertools.count(2)))
    names = (f"{preferred}-{secrets.token_hex(4)}" for _ in itertools.count()) if mirrors else plain
    return next(name for name in names if name not in taken_names and name not in _RESERVED)


def _name_of(text: object) -> str:
    """Return a valid name made from `ada`, `Ada Lovelace` or `ada@example.org`; empty if there is none."""
    if not isinstance(text, str):
        return ""
    plain = unicodedata.normalize("NFKD", text[:1000].partition("@")[0]).encode("ascii", "ignore").decode().lower()
    words = "".join(letter if letter in _LETTERS else " " for letter in plain)[:_MAX_NAME].split()
    name = "-".join(words)
    return name if is_name(f"{name}/x") else ""


@of_one_snapshot
def _names_in_use(database: HubDatabase) -> set[str]:
    """Return every namespace that belongs to somebody, or that the operator has configured."""
    sql = "SELECT name FROM namespaces UNION SELECT namespace FROM webhooks"
    return accounts.owned_namespaces(database) | {name for (name,) in database.select(sql)}

"""Trusted publishers: CI jobs that may push without a secret, recognized by the claims of their ID token (RFC 8693).

A publisher is an issuer and the exact values of some claims, for a repository or a namespace. Its ID token can be exchanged,
once, for a token valid for an hour.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

from adapterhub.hub.hub_database import HubDatabase
from adapterhub.ref import is_name
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import NotFoundError, RefusedError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from . import access_tokens, accounts, id_tokens
from .id_tokens import Issuers

LIFETIME = 3600  # seconds
_MAX_PUBLISHERS = 50  # of a namespace and its repositories
# Claims that identify a publisher: without any of them, every job at the provider would be trusted.
_IDENTIFYING_CLAIMS = (
    "sub",
    "repository",
    "repository_id",
    "project_path",
    "project_id",
    "workflow_ref",
    "job_workflow_ref",
    "email",
)


@dataclass(frozen=True, slots=True)
class Publisher:
    """A publisher trusted for `scope`, a repository or a namespace, and the account its pushes are logged under."""

    id: int
    scope: str
    issuer: str
    claims: Mapping[str, str]
    account: str


def add(database: HubDatabase, scope: str, issuer: str, claims: Mapping[str, str], account: str) -> int:
    """Trust the jobs of an issuer whose tokens have certain claims; return the publisher's id.

    Raises:
        UsageError: The claims do not identify a publisher, or a name or URL is invalid.
        RefusedError: The namespace has too many publishers.
    """
    if not is_name(scope):
        accounts.check_namespace(scope)
    accounts.check_namespace(account)
    id_tokens.check_issuer(issuer)
    if not any(claims.get(name) for name in _IDENTIFYING_CLAIMS):
        hint = f"Give one of {', '.join(_IDENTIFYING_CLAIMS)}"
        raise UsageError(issuer, "its claims would trust everybody who uses this provider", hint)
    namespace = scope.partition("/")[0]
    count = "SELECT count(*) FROM publishers WHERE scope = ? OR (scope >= ? AND scope < ?)"
    with database.transaction():
        if database.select(count, namespace, f"{namespace}/", f"{namespace}0")[0][0] >= _MAX_PUBLISHERS:  # "0" follows "/"
            raise RefusedError(namespace, f"has {_MAX_PUBLISHERS} publishers", "Remove one first")
        accounts.ensure_account(database, account)
        sql = "INSERT INTO publishers (scope, issuer, claims, account) VALUES (?, ?, ?, ?) RETURNING id"
        return int(database.select(sql, scope, issuer, json.dumps(dict(claims)), account)[0][0])


def list_publishers(database: HubDatabase) -> list[Publisher]:
    """Return the publishers, by scope."""
    rows = database.select("SELECT id, scope, issuer, claims, account FROM publishers ORDER BY scope, id")
    return [Publisher(row[0], row[1], row[2], json_file.parse_object(row[3], "hub.db"), row[4]) for row in rows]


def remove(database: HubDatabase, ident: int) -> None:
    """Stop trusting a publisher; its tokens expire within the hour.

    Raises:
        NotFoundError: There is no such publisher.
    """
    if not database.execute("DELETE FROM publishers WHERE id = ?", ident):
        raise NotFoundError(str(ident), "no such publisher", "List the publishers", code="no-such-number", kind="publisher")


def exchange(database: HubDatabase, issuers: Issuers, token: str, resource: str, audience: str) -> tuple[str, Publisher]:
    """Exchange an ID token for a token: to write to a repository, or to read in a namespace if `resource` is one.

    Raises:
        AdapterhubError: No publisher of the resource matches, or the token is invalid or was exchanged before.
    """
    # Before any verification: keys are only fetched from issuers that some publisher names.
    issuer = id_tokens.issuer_of(token)
    scopes = {resource, resource.partition("/")[0]}
    trusted = [candidate for candidate in list_publishers(database) if candidate.issuer == issuer and candidate.scope in scopes]
    if not trusted:
        raise RefusedError(
            resource[:200], f"no publisher at {issuer[:200]} is trusted here", "Ask the hub's operator to add it"
        )
    now = time.time()
    id_token = id_tokens.verify(token, issuer, audience, issuers, now=now)
    publisher = next((candidate for candidate in trusted if _matches(candidate, id_token.claims)), None)
    if publisher is None:
        claim_names = " or ".join(sorted({name for candidate in trusted for name in candidate.claims}))
        raise RefusedError(resource[:200], f"the job is not a trusted publisher: its {claim_names} is another")
    with database.transaction():
        # Rows of expired tokens are not needed: these fail verification.
        database.execute("DELETE FROM exchanged WHERE expires < ?", now - LIFETIME)
        # The key of the table makes the second exchange of a token fail, in whichever process it happens.
        sql = "INSERT INTO exchanged (ident, expires) VALUES (?, ?) ON CONFLICT DO NOTHING"
        if not database.execute(sql, id_token.ident, id_token.expires):
            raise RefusedError(resource[:200], "this ID token was exchanged before", "Request a new one from the provider")
        role = "write" if "/" in resource else "read"
        limits = access_tokens.Limits(namespaces=(resource,), kind=access_tokens.EXCHANGE, lifetime=LIFETIME)
        access_token, _ = access_tokens.issue(database, publisher.account, role, **limits)
    return access_token, publisher


def _matches(publisher: Publisher, claims: Mapping[str, object]) -> bool:
    return all(id_tokens.claim_equals(claims.get(name), value) for name, value in publisher.claims.items())

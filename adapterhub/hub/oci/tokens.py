"""Logins as docker's clients make them: they exchange a password for a token (distribution, "Token Authentication").

Here the password is the token itself, with any user name. A client without one gets the anonymous token, because these clients
read even public repositories only with a token.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.hub.access_control import NOBODY, BadTokenError, NoTokenError, token_in
from adapterhub.hub.hub import Hub
from adapterhub.hub.request_context import read_form

from .oci_errors import VERSION

_LIFETIME = 300  # seconds until clients ask again; a revoked token is refused within seconds in any case
_MAX_FORM, _MAX_FIELDS = 64 << 10, 100  # bytes and fields of a form


async def ping(hub: Hub, request: Request) -> Response:
    """GET /v2/: whether this is a registry, and how to log in. Without a token, always a challenge: skopeo asks only here."""
    identity = hub.identify(request)
    if identity is None and (hub.access.require_login or "authorization" not in request.headers):
        raise NoTokenError
    return JSONResponse({}, headers=VERSION)


async def token(hub: Hub, request: Request) -> Response:
    """GET and POST /v2/token: any scope is granted; what the token allows is checked wherever it is used."""
    sent_token = await _form_token(request) if request.method == "POST" else token_in(request.headers)
    if sent_token is not None and hub.access.token_identity(sent_token) is None:
        # Count it like any other invalid token: this endpoint must not be a way to guess faster.
        hub.access.count_attempt(hub.access.failures)
        raise BadTokenError
    answer = {"token": sent_token or NOBODY, "access_token": sent_token or NOBODY, "expires_in": _LIFETIME}
    return JSONResponse(answer, headers={**VERSION, "cache-control": "no-store"})


async def _form_token(request: Request) -> str | None:
    """Return the token in an OAuth 2 form, sent as the password or as the refresh token that clients store."""
    fields = await read_form(request, _MAX_FORM, _MAX_FIELDS)
    return fields.get("password") or fields.get("refresh_token")

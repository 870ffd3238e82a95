"""Logins as docker's clients make them: a password is exchanged for a token (distribution, "Token Authentication").

Here the password is the token, and any user name will do. Who has none gets a token that stands for nobody, as these clients
read what is public only with one.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.hub.access import NOBODY, BadTokenError, NoTokenError, token_in
from adapterhub.hub.hub import Hub
from adapterhub.hub.uploads import TooLargeError, collected

from .answers import VERSION, OciError

_LIFETIME = 300  # seconds until clients ask again; a token that is revoked is refused within seconds in any case
_MAX_FORM = 64 << 10  # bytes


async def ping(hub: Hub, request: Request) -> Response:
    """GET /v2/: whether this is a registry, and how to log in. Who has no token is always told how: skopeo asks only here."""
    who = hub.identify(request)
    if who is None and (hub.access.require_login or "authorization" not in request.headers):
        raise NoTokenError
    return JSONResponse({}, headers=VERSION)


async def token(hub: Hub, request: Request) -> Response:
    """GET and POST /v2/token: what a token may do is found where it is used, whatever scope is asked for."""
    given = await _posted(request) if request.method == "POST" else token_in(request.headers)
    if given is not None and hub.access.known(given) is None:
        hub.access.attempt(hub.access.failures)
        raise BadTokenError
    answer = {"token": given or NOBODY, "access_token": given or NOBODY, "expires_in": _LIFETIME}
    return JSONResponse(answer, headers={**VERSION, "cache-control": "no-store"})


async def _posted(request: Request) -> str | None:
    """The token in a form of OAuth 2, as a password or as the token that clients keep for later."""
    from urllib.parse import parse_qs

    try:
        raw = await collected(request.stream(), _MAX_FORM)
        fields = parse_qs(raw.decode("utf-8", "replace"), max_num_fields=100)
    except (TooLargeError, ValueError) as error:
        raise OciError(400, "UNSUPPORTED", "not the form of a request for a token") from error
    found = fields.get("password") or fields.get("refresh_token")
    return found[0] if found else None

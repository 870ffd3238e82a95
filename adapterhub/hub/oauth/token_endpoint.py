"""POST /oauth/token: a token for an approved login, for a refresh token, or for the ID token of a CI job."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.hub import request_context
from adapterhub.hub.accounts import device_logins, publishers
from adapterhub.hub.accounts.access_tokens import prefix_of
from adapterhub.hub.accounts.device_logins import DeviceError, TokenGrant
from adapterhub.hub.hf.repositories import read_document
from adapterhub.hub.hub import Hub
from adapterhub.hub.request_context import read_form
from adapterhub_converters.display import printable
from adapterhub_converters.errors import AdapterhubError

from .device import MAX_FIELDS, MAX_FORM

_EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
_SUBJECTS = ("urn:ietf:params:oauth:token-type:id_token", "urn:ietf:params:oauth:token-type:jwt")
_ISSUED = "urn:ietf:params:oauth:token-type:access_token"
_DEVICE = "urn:ietf:params:oauth:grant-type:device_code"
_NO_STORE = {"cache-control": "no-store"}


async def token(hub: Hub, request: Request) -> Response:
    """POST /oauth/token."""
    if request.headers.get("content-type", "").startswith("application/json"):
        return await _exchange_response(hub, request, await read_document(request))
    fields = await read_form(request, MAX_FORM, MAX_FIELDS)
    kind = fields.get("grant_type", "")
    try:
        if kind == _DEVICE:
            return _grant_response(await hub.workers.read(device_logins.collect, hub.database, fields.get("device_code", "")))
        if kind == "refresh_token":
            return _grant_response(await hub.workers.read(device_logins.renew, hub.database, fields.get("refresh_token", "")))
    except DeviceError as error:
        return error_response(str(error))
    return error_response("unsupported_grant_type", kind[:80])


async def _exchange_response(hub: Hub, request: Request, fields: dict[str, Any]) -> Response:
    """Return the response to a CI job's token exchange: RFC 8693, as huggingface_hub requests it."""
    subject_token, resource = (str(fields.get(name, "")) for name in ("subject_token", "resource"))
    if fields.get("grant_type") != _EXCHANGE or fields.get("subject_token_type") not in _SUBJECTS:
        return error_response("unsupported_grant_type")
    hub.access.count_attempt(hub.access.logins)
    try:
        # The audience must be the hub's own address: if the Host header counted, a token made for another service would do.
        audience = hub.own_url(request)
        access_token, publisher = await hub.sign_ins.read(
            publishers.exchange, hub.database, hub.issuers, subject_token, resource, audience
        )
    except AdapterhubError as error:
        return error_response("invalid_grant", str(error))
    context = request_context.current()
    context.set_account(publisher.account, prefix_of(access_token))
    context.record_change(resource)
    answer = {
        "access_token": access_token,
        "token_type": "bearer",
        "expires_in": publishers.LIFETIME,
        "issued_token_type": _ISSUED,
    }
    return JSONResponse(answer, headers=_NO_STORE)


def error_response(code: str, reason: str = "") -> Response:
    """Return an OAuth error (RFC 6749, 5.2)."""
    header_text = printable(reason)[:1000].encode("latin-1", "replace").decode("latin-1")
    headers = {**_NO_STORE, **({"x-error-message": header_text} if reason else {})}
    return JSONResponse({"error": code, **({"error_description": reason} if reason else {})}, 400, headers)


def _grant_response(grant: TokenGrant) -> Response:
    request_context.current().set_account(grant.account, prefix_of(grant.token))
    answer = {
        "access_token": grant.token,
        "token_type": "bearer",
        "expires_in": grant.expires,
        "refresh_token": grant.refresh,
    }
    return JSONResponse(answer, headers=_NO_STORE)

"""Device login: the program begins it, and a person approves it on the page /device, signed in or with a token."""

from __future__ import annotations

from typing import ClassVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.hub import request_context
from adapterhub.hub.accounts import device_logins
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.accounts.device_logins import CODE_LIFETIME, POLL_INTERVAL
from adapterhub.hub.hub import Hub
from adapterhub.hub.request_context import read_form
from adapterhub.hub.web.form_requests import check_origin, check_session, read_fields
from adapterhub.hub.web.site import Page, PageRequest, answer_page, render_page
from adapterhub.hub.workers import Worker
from adapterhub_converters.errors import AdapterhubError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

MAX_FORM, MAX_FIELDS = 16 << 10, 100
"""Bytes and fields of a form of OAuth."""


async def begin(hub: Hub, request: Request) -> Response:
    """POST /oauth/device: the codes of a new login."""
    hub.access.count_attempt(hub.access.logins)
    await read_form(request, MAX_FORM, MAX_FIELDS)
    device, code = await hub.workers.read(device_logins.begin, hub.database, request_context.current().address)
    url = f"{hub.url(request)}/device"
    answer = {
        "device_code": device,
        "user_code": code,
        "verification_uri": url,
        "verification_uri_complete": f"{url}?code={code}",
        "expires_in": CODE_LIFETIME,
        "interval": POLL_INTERVAL,
    }
    return JSONResponse(answer, headers={"cache-control": "no-store"})


# ---- the page


@dataclass(frozen=True)
class DevicePage(Page):
    """The form for the code of a login, or its outcome.

    Attributes:
        code: The code as entered.
        address: Where the login was begun; empty without a code.
        wrong: Why the last attempt failed.
        done: The outcome of the login; empty while it is pending.
    """

    code: str = ""
    address: str = ""
    wrong: str = ""
    done: str = ""
    template: ClassVar[str] = "device.html"


async def page(request: Request) -> Response:
    """GET /device: the form."""
    return await answer_page(request, _code_form, public=True)


def _code_form(page_request: PageRequest, _worker: Worker) -> Response:
    code = page_request.query("code")
    return _approval_form(page_request, code) if code else render_page(page_request, DevicePage())


def _approval_form(page_request: PageRequest, code: str, wrong: str = "") -> Response:
    """Return the form to approve a pending login."""
    # Codes are short: limit the guesses of a network.
    page_request.hub.access.count_attempt(page_request.hub.access.codes)
    try:
        login = device_logins.pending_login(page_request.hub.database, code)
    except AdapterhubError as error:
        return render_page(page_request, DevicePage(wrong=str(error)), 404)
    return render_page(
        page_request, DevicePage(login.code, login.address or "an unknown address", wrong), 403 if wrong else 200
    )


async def decide(request: Request) -> Response:
    """POST /device: approve or refuse a login, by the account that is signed in or has a token of this hub."""
    fields = await read_fields(request)

    def work(page_request: PageRequest, _worker: Worker) -> Response:
        check_origin(page_request)
        code = fields.get("code", "")
        identity = _deciding_identity(page_request, fields)
        if identity is None:
            return _approval_form(page_request, code, "This is not a token of this hub.")
        request_context.current().set_account(identity.account, identity.prefix, identity.token)
        page_request.hub.access.count_attempt(page_request.hub.access.codes)
        try:
            if fields.get("answer") == "deny":
                login = device_logins.deny(page_request.hub.database, code)
                return render_page(page_request, DevicePage(done=f"The login {login.code} was refused."))
            login = device_logins.approve(page_request.hub.database, code, identity)
        except RefusedError as error:
            return _approval_form(page_request, code, str(error))  # the login stays pending, for another token
        except AdapterhubError as error:
            return render_page(page_request, DevicePage(wrong=str(error)), 404)
        outcome = f"The login {login.code} was approved for {identity.account}. You can close this page."
        return render_page(page_request, DevicePage(done=outcome))

    return await answer_page(request, work, public=True)


def _deciding_identity(page_request: PageRequest, fields: dict[str, str]) -> Identity | None:
    """Return the owner of the token in the form, or else of the session."""
    if token := fields.get("token", "").strip():
        return page_request.hub.access.token_identity(token)
    if page_request.who:
        check_session(page_request, fields)
    return page_request.who

"""A login of a device: the program begins it, and a person approves it on the page /device, signed in or with a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.hub import asking
from adapterhub.hub.hf.reading import body, parse_form
from adapterhub.hub.hub import Hub
from adapterhub.hub.people import devices
from adapterhub.hub.people.devices import EXPIRES, INTERVAL
from adapterhub.hub.people.tokens import Identity
from adapterhub.hub.web.posting import check_origin, check_session, sent
from adapterhub.hub.web.site import Asked, Page, answered, rendered
from adapterhub.hub.workers import Worker
from adapterhub_converters.errors import AdapterhubError, RefusedError

_MAX_FORM = 16 << 10  # bytes


async def form(request: Request) -> dict[str, str]:
    """The fields of a form, each once."""
    return {name: values[0] for name, values in parse_form(await body(request, _MAX_FORM)).items()}


async def begin(hub: Hub, request: Request) -> Response:
    """POST /oauth/device: the codes of a new login."""
    await form(request)
    hub.access.attempt(hub.access.logins)
    device, code = await hub.workers.read(devices.begin, hub.database, asking.now().address)
    url = f"{hub.url(request)}/device"
    answer = {
        "device_code": device,
        "user_code": code,
        "verification_uri": url,
        "verification_uri_complete": f"{url}?code={code}",
        "expires_in": EXPIRES,
        "interval": INTERVAL,
    }
    return JSONResponse(answer, headers={"cache-control": "no-store"})


# ---- the page


@dataclass(frozen=True)
class DevicePage(Page):
    """The form for the code of a login, or how that ended.

    Attributes:
        code: What was entered.
        address: Where the login was begun; empty without a code.
        wrong: Why the last answer did not do.
        done: What became of the login; empty while it waits.
    """

    code: str = ""
    address: str = ""
    wrong: str = ""
    done: str = ""
    template: ClassVar[str] = "device.html"


async def page(request: Request) -> Response:
    """GET /device: the form."""
    return await answered(request, _shown, public=True)


def _shown(asked: Asked, _worker: Worker) -> Response:
    code = asked.query("code")
    return _about(asked, code) if code else rendered(asked, DevicePage())


def _about(asked: Asked, code: str, wrong: str = "") -> Response:
    """The form with a login that waits."""
    asked.hub.access.attempt(asked.hub.access.codes)
    try:
        found = devices.waiting(asked.hub.database, code)
    except AdapterhubError as error:
        return rendered(asked, DevicePage(wrong=str(error)), 404)
    return rendered(asked, DevicePage(found.code, found.address or "an unknown address", wrong), 403 if wrong else 200)


async def decide(request: Request) -> Response:
    """POST /device: approve or refuse a login, by who is signed in or has a token of this hub."""
    fields = await sent(request)

    def work(asked: Asked, _worker: Worker) -> Response:
        check_origin(asked)
        code = fields.get("code", "")
        who = _decider(asked, fields)
        if who is None:
            return _about(asked, code, "This is not a token of this hub.")
        asking.now().known(who.account, who.prefix)
        asked.hub.access.attempt(asked.hub.access.codes)
        try:
            if fields.get("answer") == "deny":
                found = devices.deny(asked.hub.database, code)
                return rendered(asked, DevicePage(done=f"The login {found.code} was refused."))
            found = devices.approve(asked.hub.database, code, who)
        except RefusedError as error:
            return _about(asked, code, str(error))  # the login waits on, for another token
        except AdapterhubError as error:
            return rendered(asked, DevicePage(wrong=str(error)), 404)
        done = f"The login {found.code} was approved for {who.account}. You can close this page."
        return rendered(asked, DevicePage(done=done))

    return await answered(request, work, public=True)


def _decider(asked: Asked, fields: dict[str, str]) -> Identity | None:
    """Who decides: the owner of the token in the form, else who is signed in."""
    if token := fields.get("token", "").strip():
        return asked.hub.access.known(token)
    if asked.who:
        check_session(asked, fields)
    return asked.who

"""Logins at a hub with a code that a person approves in a browser, for a token (RFC 8628).

The hub's answers are untrusted: every value is checked before it is shown or used, and the page for the code must be on the hub
itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from typing import Any
from urllib.parse import urlencode

from adapterhub.bases.hub_address import Hub
from adapterhub.http.http_errors import DeniedError
from adapterhub.http.responses import Response
from adapterhub.http.urls import ProxyOf, no_proxy, origin
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.json_file import is_number
from adapterhub_converters.errors import FormatError, RemoteError
from adapterhub_converters.lazy_dataclass import dataclass

from .hub_client import MAX_ANSWER, HubWire

_CLIENT = "adapterhub"
_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
_MAX_LIFETIME = 3600  # seconds that a code may be good for
_SLOW_DOWN = 5  # seconds that are added to the interval when the hub asks for it (RFC 8628, 3.5)
_ERROR_TEXTS = {
    "access_denied": "the login was refused",
    "expired_token": "the code has expired",
}


@dataclass(frozen=True)
class PendingLogin:
    """A login that waits for approval: the page and code for a person, and when the code expires by the monotonic clock."""

    page: str
    code: str
    device: str
    interval: float
    end: float


@dataclass
class HubLogin:
    """Logins at one hub."""

    endpoint: str
    proxy: ProxyOf = no_proxy
    sleep: Callable[[float], object] = time.sleep

    def begin(self) -> PendingLogin:
        """Request a code.

        Raises:
            RemoteError: The hub has no logins by code, does not answer, or is another machine without TLS.
        """
        # Refuse a hub without TLS now rather than after somebody has approved the login: it could not be sent the token.
        Hub(self.endpoint, _CLIENT).checked_token()
        response = self._post("/oauth/device", {"client_id": _CLIENT}, good=(200, 400, 404, 405))
        if response.status != 200:
            raise RemoteError(self.endpoint, "this hub has no logins by a code", code="no-device-login")
        answer_fields = self._parse(response)
        page = str(answer_fields.get("verification_uri_complete") or answer_fields.get("verification_uri") or "")
        code, device = str(answer_fields.get("user_code") or ""), str(answer_fields.get("device_code") or "")
        # A page elsewhere could ask for a password in the hub's name.
        if origin(page, self.endpoint) != origin(self.endpoint, self.endpoint) or not code.isprintable() or not device:
            raise FormatError(self.endpoint, "the hub's answer is not a login")
        lifetime = min(_positive_number(answer_fields.get("expires_in"), 900), _MAX_LIFETIME)
        return PendingLogin(
            page, code[:40], device, max(_positive_number(answer_fields.get("interval"), 5), 1), time.monotonic() + lifetime
        )

    def wait(self, login: PendingLogin) -> str:
        """Wait until the login is approved, and return the token.

        Raises:
            RemoteError: It was refused, or the code has expired.
        """
        interval = login.interval
        request_fields = {"grant_type": _GRANT, "device_code": login.device, "client_id": _CLIENT}
        while time.monotonic() < login.end:
            answer_fields = self._parse(self._post("/oauth/token", request_fields))
            if token := answer_fields.get("access_token"):
                return self._checked_token(str(token))
            error = str(answer_fields.get("error"))
            if error not in ("authorization_pending", "slow_down"):
                raise RemoteError(
                    self.endpoint, _ERROR_TEXTS.get(error, f"the hub refuses the login ({error[:80]})"), "Log in again"
                )
            interval += _SLOW_DOWN if error == "slow_down" else 0
            self.sleep(interval)
        raise RemoteError(self.endpoint, _ERROR_TEXTS["expired_token"], "Log in again")

    def account_name(self, token: str) -> str:
        """Return the name of the account that a token belongs to.

        Raises:
            DeniedError: The hub refuses it.
            RemoteError: The hub is another machine without TLS.
        """
        Hub(self.endpoint, token).checked_token()
        with closing(HubWire.open(self.endpoint, self._checked_token(token), proxy=self.proxy)) as wire:
            try:
                response = wire.request("GET", f"{self.endpoint}/api/whoami-v2", self.endpoint, good=(200,), limit=MAX_ANSWER)
            except DeniedError as error:
                hint = "Check that it is complete, and neither expired nor revoked"
                raise DeniedError(self.endpoint, "the hub refuses the token", hint) from error
        name = str(self._parse(response).get("name") or "")
        if not name.isprintable() or ":" in name:
            raise FormatError(self.endpoint, "the hub does not report whose token it is")
        return name[:200]

    def _checked_token(self, token: str) -> str:
        """Return a token that may be sent in a header: printable ASCII without spaces."""
        if not token.isascii() or not token.isprintable() or " " in token:
            raise FormatError(self.endpoint, "the hub's token has characters that no token has")
        return token

    def _post(self, path: str, fields: dict[str, str], good: tuple[int, ...] = (200, 400)) -> Response:
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        with closing(HubWire.open(self.endpoint, None, proxy=self.proxy)) as wire:
            return wire.request(
                "POST",
                self.endpoint + path,
                self.endpoint,
                good=good,
                headers=headers,
                body=urlencode(fields).encode(),
                limit=MAX_ANSWER,
                redirects=False,
            )

    def _parse(self, response: Response) -> dict[str, Any]:
        return json_file.parse_object(response.body, self.endpoint)


def _positive_number(value: object, default: float) -> float:
    return float(value) if is_number(value) and value > 0 else default

"""Requests to the API of a hub that runs adapterhub (`adapterhub.hub.api`), and the errors in its responses.

A response is untrusted: an error in it is raised again as one of the classes here, with the hub's words as one printable line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlencode

from adapterhub.bases.hub_address import SCHEME
from adapterhub.http.client import PAUSES
from adapterhub.http.http_errors import DeniedError, RetryableError
from adapterhub.http.responses import Response
from adapterhub.http.urls import ProxyOf
from adapterhub.ref import Ref, RefError
from adapterhub.remotes.answer_fields import DENIED, ERROR_KINDS
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, RemoteError
from adapterhub_converters.lazy_dataclass import dataclass

from .hub_client import HubAddress, HubWire

DRY_RUN = "dry_run"
"""The parameter of a change that is only rehearsed, and the field of a hub's description that says that it can be."""
_API, _VERSION = "/api/adapterhub", 1
_HINT_FIELDS = ("name", "ref", "repository", "meant")  # fields of an error, of refs, that a hint may show in a command
_MAX_ANSWER = 16 << 20  # bytes; a lineage may have thousands of adapters
_MAX_SMALL = 64 << 10  # bytes of an answer that says what a server is
_NO_API = (401, 403, 404, 405, 410, 501)  # statuses of servers without the API


class ApiWire(HubWire):
    """An HTTP connection to the API; `address_prefix` makes an address of a ref in an error."""

    address_prefix = ""

    def _refusal(self, response: Response, location: str) -> Exception:
        with suppress(FormatError):
            document = json_file.parse_object(response.body, location)
            if document.get("kind") == DENIED:
                return DeniedError(location, self.clean(str(document.get("what", ""))) or "the hub denies it")
            if (error_class := ERROR_KINDS.get(str(document.get("kind")))) is not None:
                fields = document.get("fields")
                named = fields if isinstance(fields, dict) else {}
                where, what, hint = (self.clean(str(document.get(key, ""))) for key in ("where", "what", "hint"))
                error = error_class(self.address_of(where), what or "the hub refuses it", hint)
                error.code = self.clean(str(document.get("code", ""))) or error.code
                # No other fields: a hub must not fill in the host of a login that a hint shows.
                texts = {key: self.clean(named[key]) for key in _HINT_FIELDS if isinstance(named.get(key), str)}
                error.fields |= {key: self.address_of(text) for key, text in texts.items()}
                error.fields["registry"] = self.address_prefix.rstrip("/")
                return error
        return super()._refusal(response, location)

    def address_of(self, text: str) -> str:
        """Return the address of a ref on the hub; any other text unchanged."""
        with suppress(RefError):
            ref = Ref.parse(text)
            version = reference_text(ref)
            return f"{self.address_prefix}{ref.name}{f'@{version}' if version else ''}"
        return text


@dataclass(frozen=True)
class ApiDescription:
    """A description of the API of a hub that runs adapterhub.

    Attributes:
        takes_dry_run: Whether the hub rehearses a change that is sent with `dry_run=true`; an older one would make it.
    """

    takes_dry_run: bool


def api_description(endpoint: str, wire: HubWire, location: str) -> ApiDescription | None:
    """Return the description of a hub's API; None if the hub does not run adapterhub, with the API that this program knows."""
    document = _document_at(f"{endpoint}{_API}", wire, location) or {}
    versions = document.get("api")
    if document.get("program") != "adapterhub" or not isinstance(versions, list) or _VERSION not in versions:
        return None
    return ApiDescription(document.get(DRY_RUN) is True)


def check_release(endpoint: str, wire: HubWire, location: str) -> None:
    """Raise RemoteError if a hub without the API runs adapterhub all the same: an earlier or a later one."""
    description = _document_at(f"{endpoint}/api/openapi.json", wire, location, limit=_MAX_ANSWER)
    info = description.get("info") if description else None
    if isinstance(info, dict) and info.get("title") == "adapterhub":
        problem = "this hub runs an adapterhub without the API that this command needs"
        raise RemoteError(location, problem, "Upgrade the older of the two", code="older-hub")


def _document_at(url: str, wire: HubWire, location: str, limit: int = _MAX_SMALL) -> dict[str, Any] | None:
    """Return the JSON object at a URL; None from a server that has none there."""
    response = wire.request("GET", url, location, good=(200, *_NO_API), limit=limit, redirects=False)
    with suppress(FormatError):
        return json_file.parse_object(response.body, location) if response.status == 200 else None
    return None


def open_wire(
    address: HubAddress, endpoint: str, token: str | None, proxy: ProxyOf, pauses: Sequence[float] = PAUSES
) -> ApiWire:
    """Open a connection to the API of the hub of an address."""
    wire = ApiWire.open(endpoint, token, pauses, proxy, address.login)
    wire.address_prefix = f"{address.scheme}://{address.host}/" if address.endpoint else SCHEME
    return wire


@dataclass(frozen=True)
class HubApi:
    """The API of one hub.

    Attributes:
        endpoint: The URL of the hub.
        wire: The connection.
        location: The hub, for errors.
    """

    endpoint: str
    wire: ApiWire
    location: str

    def request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | Sequence[tuple[str, str]] = (),
        *,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        retry: bool = True,
    ) -> dict[str, Any]:
        """Return the JSON object that the hub answers; the errors of an answer are raised as those of a registry are.

        Without `retry`, a request whose answer is lost is not sent again: it may have been obeyed, and would not be twice. Nor
        would its condition, which is no longer met, tell a change of its own from one by somebody else.
        """
        try:
            response = self.send(method, self._url(path, query), body, headers, retry=retry)
        except RetryableError as error:
            problem = f"no answer came ({error.reason}); the change may have been made"
            raise RemoteError(self.location, problem, "Look, then try again") from error
        return json_file.parse_object(response.body, self.location)

    def send(
        self,
        method: str,
        url: str,
        body: Mapping[str, Any] | None,
        headers: Mapping[str, str] | None = None,
        *,
        retry: bool = True,
    ) -> Response:
        """Send a request to any of the hub's APIs, and return its answer; the arguments are those of `request`."""
        return self.wire.request(
            method,
            url,
            self.location,
            good=(200, 201),
            headers={**(headers or {}), **({"Content-Type": "application/json"} if body is not None else {})},
            body=json_file.canonical_bytes(body) if body is not None else None,
            limit=_MAX_ANSWER,
            retry=retry,
        )

    def takes_dry_run(self) -> bool:
        """Return whether the hub rehearses a change that is sent with `dry_run=true`; an older one would make it."""
        description = api_description(self.endpoint, self.wire, self.location)
        return description is not None and description.takes_dry_run

    def pages(self, path: str, query: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        """Yield the JSON objects of all pages of a list."""
        for response in self.wire.pages(self._url(path, query), self.location, limit=_MAX_ANSWER):
            yield json_file.parse_object(response.body, self.location)

    def _url(self, path: str, query: Mapping[str, str] | Sequence[tuple[str, str]]) -> str:
        url = f"{self.endpoint}{_API}/v{_VERSION}/{path}"
        return f"{url}?{urlencode(query)}" if query else url


def reference_text(ref: Ref) -> str:
    """Return the version in a ref; empty for a bare name."""
    return str(ref)[len(ref.name) + 1 :]

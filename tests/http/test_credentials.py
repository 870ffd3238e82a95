"""Credentials go to the origin that they are of, and a login is made once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from adapterhub.http.client import Client
from adapterhub.http.http_errors import DeniedError
from adapterhub.http.urls import origin, resolve_link
from adapterhub_converters.errors import RemoteError
from tests.http.test_client import client, get, streamed
from tests.support.web_server import Handler, Web

SECRET = "not-a-secret-9"


def authorizations(web: Web) -> list[str | None]:
    """The `Authorization` of each request."""
    return [headers.get("authorization") for _, headers in web.requests]


def test_redirects_are_followed_unless_the_caller_objects_or_something_is_sent(web: Web) -> None:
    web.files["/y"] = b"y"
    web.rules["/x"] = lambda to: to.send(307, Location="y")
    Handler.do_POST = Handler.do_GET  # type: ignore[attr-defined]
    asking = client(web)
    assert asking.request("GET", f"{web.url}/x", "x", good=(200,)).url == f"{web.url}/y"
    for method, redirects in (("GET", False), ("POST", True)):
        with pytest.raises(RemoteError, match="HTTP 307"):
            asking.request(method, f"{web.url}/x", "x", good=(200,), redirects=redirects)
    del Handler.do_POST  # type: ignore[attr-defined]


def test_nothing_goes_from_https_to_http() -> None:
    assert resolve_link("http://a/x", "https://b/y", "x") == "https://b/y"
    assert resolve_link("https://a/x", "y", "x") == "https://a/y"
    with pytest.raises(RemoteError, match="from https to http"):
        resolve_link("https://a/x", "http://a/x", "x")


def test_credentials_go_to_the_server_s_origin_alone(web: Web, other_web: Web) -> None:
    other_web.files["/y"] = b"y"
    web.rules["/x"] = lambda to: to.send(302, Location=f"{other_web.url}/y")
    web.rules["/home"] = lambda to: to.send(302, Location=f"{web.url}/x")
    asking = client(web, authorizations={"": f"Bearer {SECRET}"})
    assert get(asking, "/home") == streamed(asking, "/home") == b"y"
    assert authorizations(web) == [f"Bearer {SECRET}"] * 4
    assert authorizations(other_web) == [None, None]
    asking.request("GET", f"{other_web.url}/y", "x", good=(200,))
    assert authorizations(other_web) == [None] * 3


def test_a_login_is_made_once_for_all_threads_and_again_when_it_expires(web: Web, other_web: Web) -> None:
    valid, logins = ["one"], list[tuple[list[str], str]]()

    def authorize(challenges: Sequence[str], scope: str) -> str:
        logins.append((list(challenges), scope))
        return f"Bearer {valid[0]}"

    def guarded(to: Handler) -> None:
        if to.headers["Authorization"] == f"Bearer {valid[0]}":
            to.send(200, b"in")
        else:
            to.send(401, b"{}", **{"WWW-Authenticate": 'Bearer realm="r"'})

    web.rules["/x"] = guarded
    asking = client(web, authorize=authorize)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: get(asking, "/x"), range(8))) == {b"in"}
    assert logins == [(['Bearer realm="r"'], "")]
    valid[0] = "two"
    assert get(asking, "/x") == b"in"
    assert len(logins) == 2
    other_web.rules["/z"] = lambda to: to.send(401, **{"WWW-Authenticate": 'Basic realm="give"'})
    web.rules["/away"] = lambda to: to.send(302, Location=f"{other_web.url}/z")
    with pytest.raises(DeniedError, match="HTTP 401: login required"):
        get(asking, "/away")
    assert len(logins) == 2


def test_a_login_that_is_refused_is_not_repeated(web: Web) -> None:
    web.rules["/x"] = lambda to: to.send(401)
    asking = client(web, authorize=lambda _challenges, _scope: f"Bearer {SECRET}", login_hint="Log in")
    with pytest.raises(DeniedError, match="HTTP 401: login required. Log in") as caught:
        get(asking, "/x")
    assert authorizations(web) == [None, f"Bearer {SECRET}"]
    assert SECRET not in str(caught.value) + repr(asking)


def test_a_text_with_a_secret_is_dropped() -> None:
    asking = Client("http://127.0.0.1", secrets=lambda: ["pass"], authorizations={"": f"Bearer {SECRET}"})
    assert [asking.unless_secret(text) for text in ("fine", f"no {SECRET}", "my pass!")] == ["fine", "", ""]


def test_an_origin_is_scheme_host_and_port() -> None:
    assert origin("HTTPS://Hub.Example/x", "x") == ("https", "hub.example", 443)
    assert origin("http://[::1]:5/x", "x") == ("http", "::1", 5)

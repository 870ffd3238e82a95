"""Signing in and out with a token."""

from __future__ import annotations

from contextlib import closing

import pytest

from adapterhub.hub.accounts import access_tokens
from adapterhub.hub.hub_database import HubDatabase
from tests.hub.conftest import Running, serving
from tests.hub.web.conftest import Visitor


def test_a_token_becomes_a_session_that_scripts_and_other_sites_cannot_use(hub: Running, visitor: Visitor) -> None:
    answer = visitor.post("/-/sign-in", {"token": f" {hub.token}\n", "next": "/team/sql?page=2"})
    assert (answer.status, answer.headers["location"]) == (303, "/team/sql?page=2")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert hub.token not in cookie
    signed_in = visitor.signed_in(hub.token)
    assert "alice" in signed_in.get("/").text
    assert "Sign in" in visitor.get("/").text


def test_under_tls_the_cookie_is_for_tls_alone(tmp_path: object) -> None:
    with serving(tmp_path / "hub", behind_proxy=True) as hub:  # type: ignore[operator]
        headers = {"X-Forwarded-Proto": "https", "Origin": hub.url.replace("http:", "https:")}
        answer = Visitor(hub).post("/-/sign-in", {"token": hub.token}, **headers)
        assert "Secure" in answer.headers["set-cookie"]


def test_a_token_that_is_none_is_refused_in_words(visitor: Visitor) -> None:
    answer = visitor.post("/-/sign-in", {"token": "hf_no"})
    assert answer.status == 401
    assert "unknown, revoked or expired" in answer.text
    assert "set-cookie" not in answer.headers
    assert visitor.post("/-/sign-in", {"token": "x" * 10_000}).status == 413
    assert visitor.post("/-/sign-in", {f"field-{n}": "x" for n in range(100)}).status == 400


@pytest.mark.parametrize("url", ["https://example.org/", "//example.org", "/\\example.org", "javascript:alert(1)", "/\t/x", ""])
def test_signing_in_leads_nowhere_else(hub: Running, visitor: Visitor, url: str) -> None:
    assert visitor.post("/-/sign-in", {"token": hub.token, "next": url}).headers["location"] == "/"


def test_a_form_of_another_site_is_refused(hub: Running, visitor: Visitor) -> None:
    assert visitor.post("/-/sign-in", {"token": hub.token}, Origin="https://example.org").status == 403
    assert visitor.post("/-/sign-in", {"token": hub.token}, Origin="null").status == 403
    signed_in = visitor.signed_in(hub.token)
    assert signed_in.post("/-/sign-out", {}).status == 403
    assert signed_in.post("/-/sign-out", {"csrf": "x"}).status == 403
    assert signed_in.post("/-/sign-out", {"csrf": visitor.signed_in(hub.token).csrf()}).status == 403


def test_a_session_ends_by_signing_out_and_with_its_token(hub: Running, visitor: Visitor) -> None:
    signed_in = visitor.signed_in(hub.token)
    assert signed_in.post("/-/sign-out", {"csrf": signed_in.csrf()}).status == 303
    assert "alice" not in signed_in.get("/").text
    another = visitor.signed_in(hub.token)
    with closing(HubDatabase(hub.folder)) as database:
        for token in access_tokens.list_tokens(database):
            access_tokens.revoke(database, token.id)
    assert "alice" not in another.get("/").text
    assert Visitor(hub, "adapterhub_session=guess").get("/").status == 200


def test_tokens_cannot_be_tried_at_will(hub: Running, visitor: Visitor) -> None:
    statuses = [visitor.post("/-/sign-in", {"token": f"hf_{n}"}).status for n in range(25)]
    assert statuses[0] == 401
    assert statuses[-1] == 429
    assert visitor.signed_in(hub.token).get("/").status == 200

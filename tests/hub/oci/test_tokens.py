"""Logins as docker's clients make them, and what each may see."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from adapterhub.ref import Ref
from tests.hub.conftest import Running, serving
from tests.hub.oci.conftest import Registry


def basic(password: str, user: str = "anybody") -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def test_who_has_no_token_is_told_where_to_get_one(hub: Running) -> None:
    nobody, host = Registry(hub.url, None), urlsplit(hub.url).netloc
    answer = nobody.ask("GET", "/v2/")
    assert (answer.status, answer.code, answer.headers["docker-distribution-api-version"]) == (
        401,
        "UNAUTHORIZED",
        "registry/2.0",
    )
    bearer = f'Bearer realm="{hub.url}/v2/token",service="{host}"'
    assert answer.headers.get_all("www-authenticate") == [bearer, 'Basic realm="adapterhub"']
    push = nobody.ask("POST", "blobs/uploads/", b"")
    assert push.headers.get_all("www-authenticate")[0] == f'{bearer},scope="repository:team/other:pull,push"'


def test_a_password_is_exchanged_for_a_token_or_used_as_it_is(hub: Running) -> None:
    nobody = Registry(hub.url, None)
    by_get = nobody.ask("GET", "/v2/token?service=x&scope=repository:a/b:pull", Authorization=basic(hub.token))
    form = {"Content_Type": "application/x-www-form-urlencoded"}
    by_post = nobody.ask("POST", "/v2/token", f"grant_type=password&username=x&password={hub.token}".encode(), **form)
    later = nobody.ask("POST", "/v2/token", f"grant_type=refresh_token&refresh_token={hub.token}".encode(), **form)
    for answer in (by_get, by_post, later):
        assert answer.status == 200
        token = answer.json["token"]
        assert answer.json["access_token"] == token
        assert Registry(hub.url, token).ask("GET", "/v2/").status == 200
    assert nobody.ask("GET", "/v2/", Authorization=basic(hub.token)).status == 200


@pytest.mark.parametrize("header", [basic("wrong"), basic(""), "Bearer wrong", "Basic !", "Digest x"])
def test_a_wrong_token_is_refused_everywhere(hub: Running, header: str) -> None:
    nobody = Registry(hub.url, None)
    for path in ("/v2/", "/v2/token", "tags/list"):
        answer = nobody.ask("GET", path, Authorization=header)
        assert (answer.status, answer.code) == (401, "UNAUTHORIZED")
    assert nobody.ask("POST", "/v2/token", b"grant_type=password&username=x&password=wrong").status == 401
    assert nobody.ask("POST", "/v2/token", b"x" * 100_000).status == 413


def test_a_challenge_has_nothing_of_a_name_that_cannot_be_here(hub: Running) -> None:
    for name in ("team/x%01", "team/x%22,realm=%22y", "team/x%0da"):
        answer = Registry(hub.url, "wrong").ask("GET", f"/v2/{name}/tags/list")
        assert answer.status == 401
        assert "scope" not in answer.headers.get_all("www-authenticate")[0]


def test_nobody_reads_what_is_public_and_no_more(hub: Running, registry: Registry) -> None:
    registry.put_image("x")
    token = Registry(hub.url, None).ask("GET", "/v2/token").json["token"]
    for nobody in (Registry(hub.url, None), Registry(hub.url, token)):
        assert nobody.ask("GET", "manifests/x").status == 200
        for method, path in (("POST", "blobs/uploads/"), ("PUT", "manifests/x"), ("DELETE", "manifests/x")):
            assert nobody.ask(method, path, b"").status == 401
        # A token may help: docker's clients log in then.
        assert nobody.ask("GET", "/v2/team/none/tags/list").status == 401


def test_a_private_repository_is_none_for_those_who_may_not_see_it(
    hub: Running, hf: object, adapter: Callable[..., Path]
) -> None:
    hf.create_repo("alice/secret", private=True)  # type: ignore[attr-defined]
    with hub.registry() as opened:
        version = opened.push(adapter(1), Ref("alice/secret"))
    digest = version.digest
    paths = ("tags/list", "manifests/latest", f"manifests/{digest}", f"blobs/{digest}", f"referrers/{digest}")
    eve = hub.make_token("eve", "write", namespaces=["eve"])
    for path in paths:
        assert Registry(hub.url, hub.token, "alice/secret").ask("GET", path).status == 200
        for name in ("alice/secret", "alice/secret.v1", "alice/none"):
            answer = Registry(hub.url, eve, name).ask("GET", path)
            assert (answer.status, answer.code) == (404, "NAME_UNKNOWN")
            assert Registry(hub.url, None, name).ask("GET", path).status == 401
    mount = Registry(hub.url, eve, "eve/x").ask("POST", f"blobs/uploads/?mount={digest}&from=alice/secret", b"")
    anonymous = Registry(hub.url, eve, "eve/x").ask("POST", f"blobs/uploads/?mount={digest}", b"")
    assert (mount.status, anonymous.status) == (202, 202)


def test_a_form_that_is_too_large_asks_for_no_token(hub: Running) -> None:
    oversized = b"&".join(b"a=1" for _ in range(101))
    for form, status, words in (
        (b"password=" + b"x" * (1 << 20), 413, "A body has at most 65,536 bytes here"),
        (oversized, 400, "form: more than 100 fields"),
    ):
        answer = Registry(hub.url, None).ask("POST", "/v2/token", form)
        assert (answer.status, answer.words) == (status, words)


def test_a_token_writes_only_where_it_may(hub: Running) -> None:
    for token in (hub.make_token("bob", "read"), hub.make_token("ann", "write", namespaces=["ann"])):
        refused = Registry(hub.url, token).ask("POST", "blobs/uploads/", b"")
        assert (refused.status, refused.code) == (403, "DENIED")


def test_a_hub_that_requires_a_login_shows_nothing_without(tmp_path: Path) -> None:
    with serving(tmp_path / "closed", require_login=True) as hub:
        Registry(hub.url, hub.token).put_image("x")
        for token in (None, "anonymous"):
            for path in ("/v2/", "tags/list", "manifests/x"):
                assert Registry(hub.url, token).ask("GET", path).status == 401
        assert Registry(hub.url, hub.make_token("bob", "read")).ask("GET", "manifests/x").status == 200


@pytest.mark.parametrize("path", ["/v2/", "/v2/token", "tags/list"])
def test_who_tries_many_wrong_tokens_is_told_when_to_go_on(hub: Running, path: str) -> None:
    nobody = Registry(hub.url, None)
    answers = [nobody.ask("GET", path, Authorization=basic(f"wrong-{n}")) for n in range(22)]
    assert [answer.status for answer in answers] == [401] * 20 + [429] * 2
    assert answers[-1].code == "TOOMANYREQUESTS"
    assert 0 < int(answers[-1].headers["retry-after"]) <= 60
    assert "www-authenticate" not in answers[-1].headers
    assert nobody.ask("GET", "/v2/", Authorization=basic(hub.token)).status == 200

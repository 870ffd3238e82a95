"""Signing in at an OpenID Connect provider: who is admitted gets an account of their own, and no hostile answer is believed."""

from __future__ import annotations

import base64
import hashlib
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest
import urllib3

from adapterhub.hub.accounts import access_tokens, accounts, admissions, audit_log, oidc
from adapterhub.hub.accounts.accounts import Namespace
from adapterhub.hub.accounts.oidc import Login
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.settings import Provider, Upstream
from adapterhub_converters.errors import AdapterhubError, RefusedError
from tests.conftest import Run
from tests.hub.accounts.test_devices import begin_login, collected
from tests.hub.conftest import Running, serving
from tests.hub.web.conftest import Answer, Visitor

pytest.importorskip("cryptography")
from tests.support.issuer import Issuer, issuing

LEAVE, BACK = "/-/sign-in/provider", "/-/sign-in/back"
ADA: dict[str, Any] = {
    "sub": "1",
    "preferred_username": "ada",
    "groups": ["ml"],
    "email": "ada@example.org",
    "email_verified": True,
}


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with issuing() as server:
        yield server


@pytest.fixture
def hub(tmp_path: Path, issuer: Issuer) -> Iterator[Running]:
    """A hub where people of an issuer can sign in; nobody is admitted."""
    with serving(tmp_path / "hub", provider=Provider(issuer.url, "the hub", "s:3cret")) as running:
        yield running


@pytest.fixture
def database(hub: Running) -> Iterator[HubDatabase]:
    with closing(HubDatabase(hub.folder)) as opened:
        yield opened


@dataclass(frozen=True)
class Leaving:
    """A browser that was sent to the issuer, with what it was sent there with."""

    visitor: Visitor
    query: dict[str, str]

    def back(self, **query: str) -> Answer:
        """Come back."""
        return self.visitor.get(f"{BACK}?{urlencode({'state': self.query['state'], 'code': 'c0de', **query})}")


def leave(hub: Running, following: str = "/", visitor: Visitor | None = None) -> Leaving:
    visitor = visitor or Visitor(hub)
    answer = visitor.get(f"{LEAVE}?{urlencode({'next': following})}")
    assert answer.status == 303, answer.text
    parts = urlsplit(answer.headers["location"])
    assert hub.settings.provider
    assert f"{parts.scheme}://{parts.netloc}" == hub.settings.provider.issuer
    cookie = answer.headers["set-cookie"].partition(";")[0]
    return Leaving(replace(visitor, cookie="; ".join(filter(None, (visitor.cookie, cookie)))), dict(parse_qsl(parts.query)))


def sign_in(hub: Running, issuer: Issuer, *, following: str = "/", **claims: Any) -> Answer:
    """Sign in as somebody with these claims; the answer to coming back."""
    leaving = leave(hub, following)
    issuer.answers["/token"] = {"id_token": issuer.token("the hub", nonce=leaving.query["nonce"], **{**ADA, **claims})}
    return leaving.back()


def session(hub: Running, answer: Answer) -> Visitor:
    assert answer.status == 303, answer.text
    cookies = answer.headers["set-cookie"]
    return Visitor(hub, next(part for part in cookies.replace(",", ";").split(";") if "adapterhub_session=" in part).strip())


def admit(database: HubDatabase, issuer: Issuer, role: str = "", namespace: str = "team", **claims: str) -> int:
    return admissions.add(database, issuer.url, claims, everybody=not claims, role=role, namespace=namespace)


def roles(database: HubDatabase) -> dict[str, dict[str, str]]:
    return {account.name: dict(account.roles) for account in accounts.list_accounts(database) if account.name != "alice"}


# ---- who is admitted


def test_nobody_is_admitted_without_a_rule(hub: Running, issuer: Issuer, database: HubDatabase) -> None:
    answer = sign_in(hub, issuer)
    assert (answer.status, "adapterhub_session" in answer.headers.get("set-cookie", "")) == (403, False)
    assert f"you are 1 at {issuer.url}" in answer.text
    assert roles(database) == {}
    (newest, *_) = audit_log.events(database)
    assert (newest.action, newest.name) == ("refused", f"1 at {issuer.url}")


def test_who_is_admitted_gets_an_account_its_roles_and_a_session(hub: Running, issuer: Issuer, database: HubDatabase) -> None:
    admit(database, issuer, "write", groups="ml")
    page = Visitor(hub).get("/-/sign-in?next=/team")
    assert f"Log in with {urlsplit(issuer.url).netloc}" in page.text
    assert f"{hub.url}{LEAVE}?next=%2Fteam" in page.html.values("a", "href")
    answer = sign_in(hub, issuer, following="/team")
    assert answer.headers["location"] == "/team"
    assert "HttpOnly" in answer.headers["set-cookie"]
    visitor = session(hub, answer)
    assert visitor.get("/").html.values("a", "href").count("/ada") == 1
    assert roles(database) == {"ada": {"team": "write"}}
    (newest, *_) = audit_log.events(database)
    assert (newest.action, newest.account, newest.name) == ("web.arrive", "ada", f"1 at {issuer.url}")


def test_the_issuer_gets_what_the_code_flow_with_pkce_asks_for(hub: Running, issuer: Issuer) -> None:
    leaving = leave(hub)
    query = leaving.query
    expected = ("code", "the hub", f"{hub.url}{BACK}", "openid email profile", "S256")
    names = ("response_type", "client_id", "redirect_uri", "scope", "code_challenge_method")
    assert tuple(query[name] for name in names) == expected
    leaving.back()
    path, headers, form = issuer.requests[-1]
    assert (path, form["grant_type"], form["code"], form["redirect_uri"]) == (
        "/token", "authorization_code", "c0de", f"{hub.url}{BACK}",
    )  # fmt: skip
    challenge = base64.urlsafe_b64encode(hashlib.sha256(form["code_verifier"].encode()).digest()).rstrip(b"=")
    assert challenge.decode() == query["code_challenge"]
    assert headers["Authorization"] == "Basic " + base64.b64encode(b"the%20hub:s%3A3cret").decode()
    assert "client_secret" not in form
    issuer.about["token_endpoint_auth_methods_supported"] = ["client_secret_post"]
    # What an issuer publishes is kept for an hour, so that another hub asks anew.
    with serving(hub.folder.parent / "other", provider=hub.settings.provider) as server:
        leave(server).back()
    assert (issuer.requests[-1][2]["client_secret"], "Authorization" in issuer.requests[-1][1]) == ("s:3cret", False)


def test_two_logins_have_nothing_in_common(hub: Running) -> None:
    first, second = leave(hub).query, leave(hub).query
    assert not [name for name in ("state", "nonce", "code_challenge") if first[name] == second[name]]
    assert len({first["state"], first["nonce"], first["code_challenge"]}) == 3


@pytest.mark.parametrize(
    ("claims", "admitted"),
    [
        ({}, True),
        ({"email": "ADA@Example.ORG", "email_verified": "true"}, True),
        ({"email_verified": False}, False),
        ({"email_verified": None}, False),
        ({"email": "ada@evil.org"}, False),
        ({"email": "ada@evil-example.org"}, False),
        ({"email": "ada@sub.example.org"}, False),
        ({"email": "example.org"}, False),
        ({"email": ["ada@example.org"]}, False),
        ({"email": "ada@example.org\u212a"}, False),
        ({"email": None}, False),
    ],
)
def test_a_domain_admits_verified_addresses_there(
    hub: Running, issuer: Issuer, database: HubDatabase, claims: dict[str, Any], admitted: bool
) -> None:
    admit(database, issuer, email="@example.org")
    assert (sign_in(hub, issuer, **claims).status == 303) == admitted


@pytest.mark.parametrize("groups", ["ml-team", [], ["ML"], ["m", "l"], {"ml": 1}, None, [["ml"]]])
def test_another_group_does_not_admit(hub: Running, issuer: Issuer, database: HubDatabase, groups: Any) -> None:
    admit(database, issuer, groups="ml")
    assert sign_in(hub, issuer, groups=groups).status == 403


def test_a_rule_of_another_issuer_does_not_admit(hub: Running, issuer: Issuer, database: HubDatabase) -> None:
    admissions.add(database, "https://other.example", {"groups": "ml"})
    assert sign_in(hub, issuer).status == 403


def test_a_rule_names_claims_or_admits_everybody(database: HubDatabase, issuer: Issuer) -> None:
    for claims, everybody in (({}, False), ({"groups": "ml"}, True)):
        with pytest.raises(AdapterhubError, match="Name a claim, or admit everybody"):
            admissions.add(database, issuer.url, claims, everybody=everybody)
    for bad in ({"role": "owner"}, {"namespace": "a/b"}):
        with pytest.raises(AdapterhubError):
            admissions.add(database, issuer.url, {"groups": "ml"}, **bad)  # type: ignore[arg-type]
    with pytest.raises(RefusedError):
        admissions.add(database, "http://login.example", {"groups": "ml"})


def test_roles_are_those_of_the_rules_at_the_last_login(hub: Running, issuer: Issuer, database: HubDatabase) -> None:
    rule = admit(database, issuer, "write", groups="ml")
    admit(database, issuer, "read", groups="ml")
    admit(database, issuer, groups="staff")
    session(hub, sign_in(hub, issuer, groups=["ml", "staff"]))
    assert roles(database) == {"ada": {"team": "write"}}
    accounts.set_member(database, "other", "ada", "admin")
    admissions.remove(database, rule)
    assert roles(database) == {"ada": {"other": "admin"}}
    sign_in(hub, issuer, groups=["ml"])
    assert roles(database) == {"ada": {"team": "read", "other": "admin"}}
    accounts.set_member(database, "team", "ada", "admin")
    sign_in(hub, issuer, groups=["staff"])
    assert roles(database) == {"ada": {"team": "admin", "other": "admin"}}


def test_who_is_admitted_no_more_is_out(hub: Running, issuer: Issuer, database: HubDatabase) -> None:
    admit(database, issuer, "write", groups="ml")
    visitor = session(hub, sign_in(hub, issuer))
    assert sign_in(hub, issuer, groups=[]).status == 403
    assert roles(database) == {"ada": {}}
    assert "/ada" not in visitor.get("/").html.values("a", "href")


# ---- as which account


def test_an_identity_keeps_its_account_whatever_its_name_becomes(hub: Running, issuer: Issuer, database: HubDatabase) -> None:
    admit(database, issuer)
    for claims in ({}, {"preferred_username": "bob", "email": "bob@example.org"}, {"sub": "2"}, {"sub": "2"}):
        session(hub, sign_in(hub, issuer, **claims))
    assert list(roles(database)) == ["ada", "ada-2"]


@pytest.mark.parametrize(
    "take_name",
    [
        lambda hub, database: accounts.add(database, "ada"),
        lambda hub, database: (accounts.add(database, "ada"), accounts.remove(database, "ada")),
        lambda hub, database: hub.make_token("ci", "write", namespaces=["ada"]),
        lambda hub, database: accounts.set_namespace(database, Namespace("ada", "members")),
        lambda hub, database: (accounts.add(database, "bob"), accounts.set_member(database, "ada", "bob", "admin")),
        lambda hub, database: admissions.add(database, "https://x.example", {"groups": "x"}, namespace="ada", role="write"),
    ],
)
def test_no_name_that_means_something_here_is_taken_over(
    hub: Running, issuer: Issuer, database: HubDatabase, take_name: Callable[..., object]
) -> None:
    take_name(hub, database)
    admit(database, issuer)
    visitor = session(hub, sign_in(hub, issuer))
    assert "/ada-2" in visitor.get("/").html.values("a", "href")


def test_no_namespace_that_has_adapters_is_taken_over(
    hub: Running, issuer: Issuer, database: HubDatabase, adapter: Callable[..., Path]
) -> None:
    from adapterhub.ref import Ref

    with hub.registry() as registry:
        registry.push(adapter(1), Ref("ada/sql"))
    admit(database, issuer)
    session(hub, sign_in(hub, issuer))
    assert list(roles(database)) == ["ada-2"]


@pytest.mark.parametrize(
    ("claims", "name"),
    [
        ({"preferred_username": "Ada Lovelace"}, "ada-lovelace"),
        ({"preferred_username": "ada@example.org"}, "ada"),
        ({"preferred_username": "Jérôme"}, "jerome"),
        ({"preferred_username": "../../etc"}, "etc"),
        ({"preferred_username": "mirror"}, "mirror-2"),
        ({"preferred_username": "con"}, "ada"),
        ({"preferred_username": 7}, "ada"),
        ({"preferred_username": "a" * 5000}, "a" * 60),
        ({"preferred_username": "李", "email": None}, "person"),
    ],
)
def test_a_name_is_as_near_as_may_be(
    hub: Running, issuer: Issuer, database: HubDatabase, claims: dict[str, Any], name: str
) -> None:
    admit(database, issuer)
    session(hub, sign_in(hub, issuer, **claims))
    assert list(roles(database)) == [name]


def test_nobody_takes_a_namespace_of_the_upstream_of_a_mirror_by_being_called_so(tmp_path: Path, issuer: Issuer) -> None:
    """Names of it would not be asked for there any more, and what they push would be served in their place."""
    upstream = Upstream("hub+http://127.0.0.1:1/", "http://127.0.0.1:1")
    with (
        serving(tmp_path / "mirror", provider=Provider(issuer.url, "the hub", "s:3cret"), mirror=upstream) as mirror,
        closing(HubDatabase(mirror.folder)) as database,
    ):
        admit(database, issuer)
        session(mirror, sign_in(mirror, issuer, preferred_username="mistralai"))
        (name,) = roles(database)
        assert re.fullmatch("mistralai-[0-9a-f]{8}", name)
        assert accounts.roles(database, name) == {name: "admin"}


def test_the_operator_links_an_identity_to_an_account(hub: Running, issuer: Issuer, database: HubDatabase, run: Run) -> None:
    accounts.add(database, "root")
    link = ("hub", "user", "link", "root", "--issuer", issuer.url, "--subject", "1", "--registry", hub.folder)
    assert f"1 at {issuer.url} signs in as root" in run(*link).stdout
    assert "/root" in session(hub, sign_in(hub, issuer)).get("/").html.values("a", "href")
    assert roles(database) == {"root": {}}


def test_a_removed_account_stays_out_until_the_operator_adds_it_again(
    hub: Running, issuer: Issuer, database: HubDatabase
) -> None:
    admit(database, issuer)
    visitor = session(hub, sign_in(hub, issuer))
    accounts.remove(database, "ada")
    assert "/ada" not in visitor.get("/").html.values("a", "href")
    assert "this account was removed" in sign_in(hub, issuer).text
    accounts.add(database, "ada")  # of somebody else, as far as the hub knows
    session(hub, sign_in(hub, issuer))
    assert list(roles(database)) == ["ada", "ada-2"]


# ---- sessions


def test_signing_out_ends_the_session_and_its_token(hub: Running, issuer: Issuer, database: HubDatabase) -> None:
    admit(database, issuer)
    visitor = session(hub, sign_in(hub, issuer))
    assert [token.kind for token in access_tokens.list_tokens(database) if token.account == "ada"] == ["browser"]
    visitor.post("/-/sign-out", {"csrf": visitor.csrf()})
    assert "/ada" not in visitor.get("/").html.values("a", "href")
    assert [token for token in access_tokens.list_tokens(database) if token.account == "ada"] == []


def test_who_signed_in_elsewhere_approves_the_login_of_a_device(hub: Running, issuer: Issuer, database: HubDatabase) -> None:
    admit(database, issuer, "write", groups="ml")
    login = begin_login(hub)
    page = f"/device?code={login['user_code']}"
    visitor = session(hub, sign_in(hub, issuer, following=page))
    assert "Approve for ada" in visitor.get(page).text
    fields = {"code": login["user_code"], "answer": "approve", "csrf": visitor.csrf(page)}
    assert "was approved for ada" in visitor.post("/device", fields).text
    identity = access_tokens.identify(database, collected(hub, login)["access_token"])
    assert identity
    assert (identity.account, identity.role_in("team"), identity.role_in("other")) == ("ada", "write", "")


@pytest.mark.parametrize("url", ["https://example.org/", "//example.org", "/\\example.org", "javascript:alert(1)", "/\t/x", ""])
def test_signing_in_elsewhere_leads_back_to_the_hub_alone(
    hub: Running, issuer: Issuer, database: HubDatabase, url: str
) -> None:
    admit(database, issuer)
    assert sign_in(hub, issuer, following=url).headers["location"] == "/"


def test_the_address_of_the_hub_is_not_what_a_request_says(hub: Running) -> None:
    answer = urllib3.request("GET", f"{hub.url}{LEAVE}", headers={"Host": "evil.example"})
    assert (answer.status, "answers requests to localhost only" in answer.json()["error"]) == (403, True)


def test_login_leads_to_the_page_with_both_ways(hub: Running) -> None:
    answer = urllib3.request("GET", f"{hub.url}/login?next=/team", redirect=False, retries=False)
    assert (answer.status, answer.headers["location"]) == (303, "/-/sign-in?next=/team")


def test_a_hub_without_a_provider_offers_none(tmp_path: Path) -> None:
    with serving(tmp_path / "plain") as plain:
        visitor = Visitor(plain)
        assert "Log in with" not in visitor.get("/-/sign-in").text
        assert [visitor.get(path).status for path in (LEAVE, BACK)] == [404, 404]


def test_logins_cannot_be_begun_at_will(hub: Running) -> None:
    assert [Visitor(hub).get(LEAVE).status for _ in range(32)][-1] == 429


# ---- what is refused


def test_a_login_is_completed_by_the_browser_that_began_it_alone(hub: Running, issuer: Issuer, database: HubDatabase) -> None:
    admit(database, issuer)
    mine, attacker = leave(hub), leave(hub)
    issuer.answers["/token"] = {"id_token": issuer.token("the hub", nonce=attacker.query["nonce"], **ADA)}
    words = "begun in another browser"
    forged = "A" * 43 + ".99999999999." + b"/".hex()
    late = Login(f"{mine.visitor.cookie.partition('=')[2].partition('.')[0]}.1000.2f", b"")
    for visitor, state in (
        (Visitor(hub), attacker.query["state"]),
        (mine.visitor, attacker.query["state"]),
        (mine.visitor, ""),
        (mine.visitor, "é"),
        (replace(mine.visitor, cookie=f"adapterhub_login={forged}"), attacker.query["state"]),
        (replace(mine.visitor, cookie=f"adapterhub_login={late.cookie}"), mine.query["state"]),
    ):
        answer = visitor.get(f"{BACK}?{urlencode({'state': state, 'code': 'c0de'})}")
        assert (answer.status, words in answer.text) == (403, True)
    assert not [path for path, *_ in issuer.requests if path == "/token"]
    assert mine.back().status == 403  # with the attacker's code: its token is of another login


def test_a_login_ends_after_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    login = Login.begin(b"key", "/team")
    assert login.check(login.state) == "/team"
    ended = Login(login.cookie.replace(login.cookie.split(".")[1], "1000"), b"key")
    with pytest.raises(RefusedError):
        ended.check(login.state)
    with pytest.raises(RefusedError):
        ended.check(ended.state)


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        ({"nonce": "x"}, "belongs to another login"),
        ({"nonce": None}, "belongs to another login"),
        ({"aud": "another client"}, "not for the hub"),
        ({"aud": ["the hub", "another client"]}, "not for the hub"),
        ({"iss": "https://other.example"}, "issued by another issuer"),
        ({"exp": 1000}, "not valid now"),
        ({"alg": "none"}, "not accepted"),
        ({"alg": "HS256"}, "not accepted"),
        ({"kid": "unknown"}, "with any of the issuer's keys"),
        ({"sub": None}, "not a subject"),
        ({"sub": 7}, "not a subject"),
        ({"sub": "x" * 300}, "not a subject"),
        ({"sub": "x\ny"}, "not a subject"),
    ],
)
def test_a_token_that_is_not_good_for_this_login_is_refused(
    hub: Running, issuer: Issuer, database: HubDatabase, claims: dict[str, Any], words: str
) -> None:
    admit(database, issuer)
    leaving = leave(hub)
    token_claims = {"audience": "the hub", "nonce": leaving.query["nonce"], **ADA, **claims}
    token_claims["audience"] = token_claims.pop("aud", token_claims["audience"])
    issuer.answers["/token"] = {"id_token": issuer.token(**token_claims)}
    answer = leaving.back()
    assert (answer.status, words in answer.text) == (403, True), answer.text
    assert roles(database) == {}


def test_a_token_of_another_issuer_is_refused_though_it_signed_it_well(
    hub: Running, issuer: Issuer, database: HubDatabase
) -> None:
    admit(database, issuer)
    with issuing(1) as other_issuer:
        leaving = leave(hub)
        for iss in (other_issuer.url, issuer.url):
            issuer.answers["/token"] = {
                "id_token": other_issuer.token("the hub", nonce=leaving.query["nonce"], **{**ADA, "iss": iss})
            }
            assert leaving.back().status == 403
    assert roles(database) == {}


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"iss": "https://other.example"}, "from another issuer"),
        ({"error": "access_denied", "error_description": "<b>No</b>"}, "answers access_denied: <b>No</b>"),
        ({"code": ""}, "has no code"),
        ({"code": "x" * 5000}, "refused"),
    ],
)
def test_an_answer_without_a_code_of_the_issuer_is_refused(hub: Running, query: dict[str, str], words: str) -> None:
    answer = leave(hub).back(**query)
    assert answer.status in (400, 403)
    assert words in answer.text or query.get("code")


@pytest.mark.parametrize(
    ("path", "answer", "words"),
    [
        ("/token", b"<html>", "JSON"),
        ("/token", b"[]", ""),
        ("/token", {}, "gives no ID token"),
        ("/token", {"id_token": ["x"]}, "gives no ID token"),
        ("/token", {"id_token": "x.y.z"}, ""),
        ("/token", (401, {}, {"error": "invalid_client"}), "id and secret. Ask the hub's operator to check them"),
        ("/token", (400, {}, {"error": "invalid_grant"}), "HTTP 400"),
        ("/token", (302, {"Location": "http://127.0.0.1:9/"}, b""), "HTTP 302"),
        ("/token", (200, {"Content-Length": str(2 << 20)}, b" " * (2 << 20)), "larger than the limit"),
        ("/token", (200, {"Content-Length": "9999"}, b"{"), "too early"),
        ("/token", (200, {f"X-{n}": "x" * 2000 for n in range(90)}, b"{}"), "headers are longer"),
        ("/keys", (302, {"Location": "http://169.254.169.254/"}, b""), "must not"),
        ("/keys", {"keys": "x"}, "with any of the issuer's keys"),
    ],
)
def test_a_hostile_answer_ends_in_one_page_of_words(
    hub: Running, issuer: Issuer, database: HubDatabase, path: str, answer: Any, words: str
) -> None:
    admit(database, issuer)
    if path == "/keys":
        issuer.answers[path] = answer
        page = Visitor(hub).get(LEAVE) if isinstance(answer, tuple) else sign_in(hub, issuer)
    else:
        leaving = leave(hub)
        issuer.answers[path] = answer
        page = leaving.back()
    assert page.status in (400, 403), page.text
    assert words in page.text
    assert "s:3cret" not in page.text
    assert roles(database) == {}


@pytest.mark.parametrize("path", [LEAVE, BACK])
def test_an_issuer_that_is_down_ends_in_one_page_of_words_and_the_hub_goes_on(hub: Running, issuer: Issuer, path: str) -> None:
    leaving = leave(hub)
    issuer.server_close()
    with serving(hub.folder.parent / "other", provider=hub.settings.provider) as server:
        answer = leaving.back() if path == BACK else Visitor(server).get(path)
    assert answer.status in (400, 403)
    assert urlsplit(issuer.url).netloc in answer.text
    assert Visitor(hub).signed_in(hub.token).get("/").status == 200


def test_no_log_and_no_address_has_a_secret(
    hub: Running, issuer: Issuer, database: HubDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    admit(database, issuer)
    issuer.about["userinfo_endpoint"] = f"{issuer.url}/userinfo"
    issuer.answers["/userinfo"] = ADA
    with caplog.at_level(logging.DEBUG):
        leaving = leave(hub)
        token = issuer.token("the hub", nonce=leaving.query["nonce"], **ADA)
        issuer.answers["/token"] = {"id_token": token, "access_token": "acc3ss"}
        answer = leaving.back()
        issuer.answers["/token"] = (400, {}, {"error": "invalid_grant", "error_description": "c0de of s:3cret"})
        refused = leaving.back()
    assert (answer.status, refused.status) == (303, 403)
    form = next(form for path, _, form in issuer.requests if path == "/token")
    hidden = [form["code_verifier"], "s:3cret", "acc3ss", token]
    all_secrets = [*hidden, leaving.query["state"], leaving.query["nonce"], "c0de", *session(hub, answer).cookie.split("=")[1:]]
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("adapterhub")]
    rows = [f"{event.name} {event.detail}" for event in audit_log.events(database)]
    assert any(BACK in line for line in lines)
    assert not [
        secret for secret in all_secrets if secret in "\n".join([*lines, *rows, answer.headers["location"], refused.text])
    ]
    assert not [secret for secret in hidden if secret in str(leaving.query)]


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"issuer": "https://other.example"}, "another issuer"),
        ({"authorization_endpoint": "javascript:alert(1)"}, "not http or https"),
        ({"authorization_endpoint": None}, "not http or https"),
        ({"authorization_endpoint": "http://user:pass@login.example/"}, "credentials"),
        ({"token_endpoint": "http://169.254.169.254/latest"}, "must not"),
        ({"token_endpoint": "file:///etc/passwd"}, "not http or https"),
        ({"token_endpoint": 7}, "no valid HTTPS address"),
        ({"token_endpoint": None}, "no valid HTTPS address"),
    ],
)
def test_addresses_of_a_hostile_issuer_are_not_followed(
    hub: Running, issuer: Issuer, database: HubDatabase, about: dict[str, Any], words: str
) -> None:
    admit(database, issuer)
    issuer.about |= about
    answer = Visitor(hub).get(LEAVE)
    if answer.status == 303:
        answer = leave(hub).back()
    assert answer.status in (400, 403)
    assert words in answer.text


def test_what_the_issuer_tells_besides_the_token_counts_if_it_is_of_the_same_person(
    hub: Running, issuer: Issuer, database: HubDatabase
) -> None:
    admit(database, issuer, "read", groups="ml")
    issuer.about["userinfo_endpoint"] = f"{issuer.url}/userinfo"
    for subject, status in (("1", 303), ("2", 403)):
        leaving = leave(hub)
        token = issuer.token("the hub", nonce=leaving.query["nonce"], sub="1")
        issuer.answers |= {"/token": {"id_token": token, "access_token": "acc"}, "/userinfo": {**ADA, "sub": subject}}
        assert leaving.back().status == status
        assert issuer.requests[-1][1]["Authorization"] == "Bearer acc"
    issuer.answers["/userinfo"] = (302, {"Location": f"{issuer.url}/elsewhere"}, b"")
    assert leaving.back().status == 403
    assert issuer.requests[-1][0] == "/userinfo"


@pytest.mark.parametrize("url", ["http://login.example", "login.example", "https://user@login.example"])
def test_a_provider_without_tls_is_not_started_with(url: str) -> None:
    with pytest.raises(AdapterhubError):
        oidc.check(Provider(url, "hub"))


def test_rules_are_kept_by_commands(hub: Running, run: Run, issuer: Issuer, database: HubDatabase) -> None:
    at = ("--registry", hub.folder)
    added = ("--issuer", issuer.url, "--claim", "groups=ml", "--role", "write", "--namespace", "team")
    assert f"rule 1 admits groups=ml of {issuer.url}" in run("hub", "admission", "add", *added, *at).stdout
    assert "groups=ml  team       write" in run("hub", "admission", "list", *at).stdout
    assert sign_in(hub, issuer).status == 303
    run("hub", "admission", "rm", "1", *at)
    assert sign_in(hub, issuer).status == 403
    stderr = run("hub", "admission", "rm", "1", *at, code=3).stderr
    assert "1: no such rule. `adapterhub hub admission list --registry " in stderr
    assert "` shows the numbers; --registry names another hub" in stderr
    assert "Name a claim" in run("hub", "admission", "add", "--issuer", issuer.url, *at, code=2).stderr
    assert [event.action for event in audit_log.events(database) if event.action.startswith("cli.")] == [
        "cli.admission.rm", "cli.admission.add",
    ]  # fmt: skip
    wrong = run("hub", "start", "--oidc-issuer", issuer.url, *at, code=2).stderr
    assert "--oidc-client" in wrong

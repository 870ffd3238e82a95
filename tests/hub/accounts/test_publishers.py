"""Trusted publishers: a CI job pushes with its provider's ID token, by hf's own exchange; anything else is refused."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import urllib3

from adapterhub.hub.accounts import access_tokens, accounts, publishers
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.ref import Ref
from adapterhub_converters.errors import AdapterhubError, NotFoundError
from tests.hub.conftest import Running, run_hf

pytest.importorskip("cryptography")
from tests.support.issuer import Issuer, coded, issuing

_EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
_ID_TOKEN = "urn:ietf:params:oauth:token-type:id_token"


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with issuing() as server:
        yield server


def job(issuer: Issuer, audience: str, **claims: Any) -> str:
    """The token of a job of org/trainer."""
    return issuer.token(audience, **{"sub": "repo:org/trainer", "repository": "org/trainer", **claims})


@pytest.fixture
def trusting(hub: Running, issuer: Issuer) -> Running:
    """A hub that trusts jobs of org/trainer for team/sql."""
    with closing(HubDatabase(hub.folder)) as database:
        publishers.add(database, "team/sql", issuer.url, {"repository": "org/trainer"}, "trainer")
    return hub


def exchange(hub: Running, token: str, resource: str = "team/sql", **headers: str) -> Any:
    request_body = {"grant_type": _EXCHANGE, "subject_token_type": _ID_TOKEN, "subject_token": token, "resource": resource}
    return urllib3.request("POST", f"{hub.url}/oauth/token", json=request_body, headers=headers, retries=False)


@pytest.mark.parametrize("alg", ["RS256", "ES256"])
def test_a_job_of_a_trusted_publisher_pushes_by_hf_s_own_exchange(
    trusting: Running, issuer: Issuer, adapter: Callable[..., Path], tmp_path: Path, alg: str
) -> None:
    keyless: dict[str, Any] = {"HF_TOKEN": "", "HF_OIDC_RESOURCE": "team/sql"}
    for seed in (1, 2):
        token = job(issuer, trusting.url, alg=alg)
        run_hf(trusting, tmp_path, "upload", "team/sql", str(adapter(seed)), HF_OIDC_ID_TOKEN=token, **keyless)
    with trusting.registry() as registry:
        assert [(entry.op, entry.author) for entry in registry.log(Ref("team/sql"))] == [("push", "trainer")] * 2


def test_the_token_is_for_an_hour_and_one_repository(trusting: Running, issuer: Issuer) -> None:
    document = exchange(trusting, job(issuer, trusting.url)).json()
    assert (document["token_type"], document["expires_in"]) == ("bearer", 3600)
    headers = {"authorization": f"Bearer {document['access_token']}"}

    def create(name: str) -> int:
        request_body = {"organization": "team", "name": name}
        return urllib3.request(
            "POST", f"{trusting.url}/api/repos/create", json=request_body, headers=headers, retries=False
        ).status

    assert (create("sql"), create("other")) == (200, 403)


def test_a_token_is_exchanged_once(trusting: Running, issuer: Issuer) -> None:
    token = job(issuer, trusting.url)
    assert exchange(trusting, token).status == 200
    again = exchange(trusting, token)
    assert (again.status, again.json()["error"]) == (400, "invalid_grant")
    assert again.json()["error_description"] == (
        "team/sql: this ID token was exchanged before. Request a new one from the provider"
    )


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        ({"repository": "org/other"}, "not a trusted publisher"),
        ({"repository": ["org/trainer"]}, "not a trusted publisher"),
        ({"aud": "https://other.example"}, "not for"),
        ({"aud": ["https://other.example", "x"]}, "not for"),
        ({"exp": 1000}, "not valid now"),
        ({"nbf": 2**33}, "not valid now"),
        ({"exp": 2**33}, "for too long"),
        ({"exp": "soon"}, "is not a time"),
        ({"iss": "https://evil.example"}, "is trusted here"),
        ({"alg": "none"}, "not accepted"),
        ({"alg": "HS256"}, "not accepted"),
        ({"kid": "unknown"}, "with any of the issuer's keys"),
        ({"kid": "e"}, "with any of the issuer's keys"),
    ],
)
def test_what_is_not_a_good_token_of_the_publisher_is_refused(
    trusting: Running, issuer: Issuer, claims: dict[str, Any], words: str
) -> None:
    claims = dict(claims)
    answer = exchange(trusting, job(issuer, claims.pop("aud", trusting.url), **claims))
    assert (answer.status, words in answer.json()["error_description"]) == (400, True), answer.json()


def test_claims_that_were_changed_are_refused(trusting: Running, issuer: Issuer) -> None:
    header, claims, signature = job(issuer, trusting.url, repository="org/other").split(".")
    document = json.loads(base64.urlsafe_b64decode(claims + "=="))
    forged = coded(json.dumps({**document, "repository": "org/trainer"}).encode())
    assert "with any of the issuer's keys" in exchange(trusting, f"{header}.{forged}.{signature}").json()["error_description"]


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("", "not a signed JSON web token"),
        ("x", "not a signed JSON web token"),
        ("a.b.c", "not a JSON web token: a part is not in base64url"),
        ("e30.e30.", "is trusted here"),
        ("." * 40, "not a signed JSON web token"),
        ("e30." * 3, "not a signed JSON web token"),
        ("é.é.é", "not a signed JSON web token"),
        ("e30.e30.e30" + "A" * 20_000, "not a signed JSON web token"),
    ],
)
def test_what_is_no_token_is_refused(trusting: Running, token: str, words: str) -> None:
    answer = exchange(trusting, token)
    assert (answer.status, words in answer.json()["error_description"]) == (400, True), answer.json()


def test_an_issuer_that_publishes_as_another_is_not_believed(trusting: Running, issuer: Issuer) -> None:
    issuer.about["issuer"] = "https://other.example"
    answer = exchange(trusting, job(issuer, trusting.url))
    assert answer.json()["error_description"] == f"{issuer.url}: its configuration names another issuer"


def test_a_publisher_that_is_not_there_is_not_removed(hub: Running) -> None:
    says = "7: no such publisher. List the publishers"
    with closing(HubDatabase(hub.folder)) as database, pytest.raises(NotFoundError, match=says) as error:
        publishers.remove(database, 7)
    assert (error.value.code, error.value.fields) == ("no-such-number", {"kind": "publisher"})


def test_a_request_cannot_say_whom_a_token_is_for(trusting: Running, issuer: Issuer) -> None:
    answer = exchange(trusting, job(issuer, "http://other.example"), Host="other.example")
    assert (answer.status, "answers requests to localhost only" in answer.json()["error"]) == (403, True)


def test_other_repositories_have_other_publishers(trusting: Running, issuer: Issuer) -> None:
    assert exchange(trusting, job(issuer, trusting.url), "team/other").status == 400
    assert exchange(trusting, job(issuer, trusting.url), "team").status == 400


def test_a_removed_account_publishes_nothing_more(trusting: Running, issuer: Issuer) -> None:
    token = exchange(trusting, job(issuer, trusting.url)).json()["access_token"]
    with closing(HubDatabase(trusting.folder)) as database:
        accounts.remove(database, "trainer")
        assert access_tokens.identify(database, token) is None
    assert exchange(trusting, job(issuer, trusting.url)).status == 400


def test_a_publisher_of_a_namespace_may_push_to_its_repositories(hub: Running, issuer: Issuer) -> None:
    with closing(HubDatabase(hub.folder)) as database:
        publishers.add(database, "team", issuer.url, {"sub": "repo:org/trainer"}, "trainer")
    assert exchange(hub, job(issuer, hub.url), "team/any").status == 200
    assert exchange(hub, job(issuer, hub.url), "other/any").status == 400


@pytest.mark.parametrize(
    ("issuer_url", "claims", "words"),
    [
        ("https://ci.example", {}, "its claims would trust everybody who uses this provider. Give one of "),
        ("https://ci.example", {"ref": "refs/heads/main"}, "its claims would trust everybody who uses this provider. Give "),
        ("http://ci.example", {"sub": "x"}, ""),
        ("file:///etc", {"sub": "x"}, ""),
    ],
)
def test_a_publisher_that_could_be_anybody_is_not_added(
    tmp_path: Path, issuer_url: str, claims: dict[str, str], words: str
) -> None:
    with closing(HubDatabase(tmp_path)) as database, pytest.raises(AdapterhubError, match=words):
        publishers.add(database, "team/sql", issuer_url, claims, "ci")

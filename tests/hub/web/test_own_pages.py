"""The pages on which people manage their tokens and their namespaces, without JavaScript, and the forms of all pages."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from adapterhub.hub.accounts import access_tokens, accounts, audit_log
from adapterhub.hub.administration import namespace_admins
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.web import namespace_settings, routes
from tests.hub.conftest import Running
from tests.hub.web.conftest import Answer, Visitor, person

FORMS = sorted(
    route.path  # type: ignore[attr-defined]
    for route in routes.routes()
    if "POST" in route.methods and route.path.startswith(("/-/admin/", "/-/account/", "/-/namespaces/"))  # type: ignore[attr-defined]
)


def send(visitor: Visitor, path: str, **fields: str) -> Answer:
    return visitor.post(path, {"csrf": visitor.csrf(), **fields})


def secret_on(answer: Answer) -> str:
    """The secret of a page that shows one."""
    assert (answer.status, answer.headers["cache-control"]) == (200, "no-store")
    return answer.html.texts[
        next(at for at, text in enumerate(answer.html.texts) if re.fullmatch(r"hf_\w{40}|[0-9a-f]{64}", text))
    ]


def test_there_are_forms() -> None:
    assert len(FORMS) > 15


@pytest.mark.parametrize("path", FORMS)
def test_no_form_is_taken_from_another_site_session_or_stranger(
    hub: Running, visitor: Visitor, database: HubDatabase, path: str
) -> None:
    root = person(visitor, database, "root", everywhere="admin")
    before = database.select("SELECT count(*) FROM tokens UNION ALL SELECT count(*) FROM members")
    fields = {"namespace": "team", "name": "x", "role": "read", "account": "ada", "url": "https://hooks.example"}
    assert root.post(path, {**fields, "csrf": ""}).status == 403
    assert root.post(path, {**fields, "csrf": "0" * 64}).status == 403
    assert root.post(path, {**fields, "csrf": root.csrf()}, Origin="https://evil.example").status == 403
    assert visitor.post(path, fields).headers["location"] == "/-/sign-in"
    assert database.select("SELECT count(*) FROM tokens UNION ALL SELECT count(*) FROM members") == before


@pytest.mark.parametrize("path", [path for path in FORMS if not path.startswith("/-/account/")])
def test_no_form_does_what_the_client_has_no_role_for(hub: Running, visitor: Visitor, database: HubDatabase, path: str) -> None:
    writer = person(visitor, database, "ada", team="write")
    fields = {"namespace": "team", "name": "x", "role": "read", "account": "ada", "url": "https://hooks.example", "token": "1"}
    fields |= {"issuer": "https://gitlab.com", "claims": "sub=x", "artifacts": "any", "readers": "anyone", "action": "remove"}
    assert send(writer, path, **fields).status == 403


def test_somebody_makes_a_token_on_their_page_and_revokes_it(visitor: Visitor, database: HubDatabase) -> None:
    ada = person(visitor, database, "ada", team="write")
    page = ada.get("/-/account")
    assert "/-/namespaces/ada" in page.html.values("a", "href")
    assert "/-/namespaces/team" not in page.html.values("a", "href")
    token_page = send(ada, "/-/account/token", name="laptop", role="write", namespaces="team, ada", days="30")
    secret = secret_on(token_page)
    identity = access_tokens.identify(database, secret)
    assert identity
    assert (identity.namespaces, identity.role_in("team")) == (("team", "ada"), "write")
    listed = ada.get("/-/account")
    assert "laptop" in listed.text
    assert secret not in listed.body.decode()
    assert send(ada, "/-/account/revoke", token=str(identity.token)).headers["location"] == "/-/account"
    assert access_tokens.identify(database, secret) is None
    assert send(ada, "/-/account/token", name="x", role="write", days="many").status == 400
    assert visitor.get("/-/account").headers["location"].startswith("/-/sign-in")


def test_somebody_sets_a_profile_that_the_page_of_their_namespace_shows(
    visitor: Visitor, database: HubDatabase, push: Callable[..., str]
) -> None:
    ada = person(visitor, database, "ada")
    push("ada/sql")
    fields = {"full_name": "Ada <b>Lovelace</b>", "about": "Numbers.", "link": "https://example.org/?a=1&b=2"}
    assert send(ada, "/-/account/profile", **fields).headers["location"] == "/-/account"
    assert "Ada <b>Lovelace</b>" in ada.get("/-/account").html.values("input", "value")
    page = visitor.get("/ada")
    assert {"Ada <b>Lovelace</b>", "Numbers."} <= {*page.html.texts}
    assert fields["link"] in page.html.values("a", "href")
    assert send(ada, "/-/account/profile", link="javascript:x").status == 400


def test_an_admin_manages_a_namespace_on_its_page(visitor: Visitor, database: HubDatabase) -> None:
    boss = person(visitor, database, "boss", team="admin")
    accounts.add(database, "ada")
    page = "/-/namespaces/team"
    assert send(boss, f"{page[:-5]}/member", namespace="team", account="ada", role="write").headers["location"] == page
    assert ("ada", "write") in [(member.account, member.role) for member in accounts.members(database, "team")]
    refused = send(boss, "/-/namespaces/member", namespace="team", account="boss", role="read")
    assert (refused.status, "is the last admin of team" in refused.text) == (400, True)
    assert "although nobody else is an admin" in boss.get(page).text
    send(boss, "/-/namespaces/readers", namespace="team", readers="members", artifacts="adapters")
    assert accounts.namespace_settings(database, "team") == accounts.Namespace("team", "members", adapters_only=True)
    send(boss, "/-/namespaces/ask-quota", namespace="team", gigabytes="1.5", files="20", reason="more data")
    (quota_request,) = namespace_admins.quota_requests(database)
    assert (quota_request.max_bytes, quota_request.max_files, quota_request.reason) == (1_500_000_000, 20, "more data")
    key = secret_on(send(boss, "/-/namespaces/key", namespace="team", name="ci", role="read"))
    assert access_tokens.identify(database, key)
    hook = secret_on(send(boss, "/-/namespaces/webhook", namespace="team", url="https://hooks.example/x"))
    claims = "repository=org/x\r\nref=main\r\n"
    fields = {"namespace": "team", "scope": "team", "issuer": "https://gitlab.com", "claims": claims}
    assert send(boss, "/-/namespaces/publisher", **fields).status == 303
    answer = boss.get(page)
    for text in ("ada", "1.5 GB and 20 files", "https://hooks.example/x", "repository=org/x", "ref=main", "web.set_member"):
        assert text in answer.text, text
    assert key not in answer.body.decode()
    assert hook not in answer.body.decode()
    for path, field in (("revoke-key", "token"), ("remove-webhook", "webhook"), ("remove-publisher", "publisher")):
        number = re.search(rf'name="{field}" value="(\d+)"', answer.body.decode())
        assert number
        assert send(boss, f"/-/namespaces/{path}", namespace="team", **{field: number[1]}).status == 303
    assert send(boss, "/-/namespaces/drop-quota", namespace="team").status == 303
    assert send(boss, "/-/namespaces/member", namespace="team", account="ada", remove="true").status == 303
    assert [member.account for member in accounts.members(database, "team")] == ["boss"]


def test_an_admin_of_the_hub_invites_disables_and_gives_quotas(visitor: Visitor, database: HubDatabase) -> None:
    root = person(visitor, database, "root", everywhere="admin")
    token = secret_on(send(root, "/-/admin/invite", account="ada", namespace="team", role="admin"))
    ada = visitor.signed_in(token)
    send(ada, "/-/namespaces/ask-quota", namespace="team", gigabytes="0.123456789", files="3")
    page = root.get("/-/admin").html
    give = {key: str(value) for key, value in _fields(page.elements, "/-/admin/quota")}
    assert send(root, "/-/admin/quota", **{key: value for key, value in give.items() if key != "csrf"}).status == 303
    assert accounts.namespace_settings(database, "team") == accounts.Namespace("team", max_bytes=123_456_789, max_files=3)
    assert send(root, "/-/admin/account", account="ada", action="disable").status == 400
    assert send(root, "/-/admin/account", account="ada", action="disable", force="true").status == 303
    assert ada.get("/-/account").status == 303
    assert send(root, "/-/admin/account", account="ada", action="enable").status == 303
    assert ada.get("/-/account").status == 200
    rule = {"issuer": "https://login.example", "claims": "groups=ml", "namespace": "team", "role": "read"}
    assert send(root, "/-/admin/rule", **rule).status == 303
    assert "groups=ml" in root.get("/-/admin").text
    assert send(root, "/-/admin/account", account="ada", action="remove", force="true").status == 303
    assert send(root, "/-/admin/account", account="ada", action="x").status == 400
    changes = {row.action for row in audit_log.events(database, limit=50)}
    assert {"web.invite", "web.set_quota", "web.change_account", "web.add_rule", "web.ask_quota"} <= changes


def _fields(elements: list[tuple[str, dict[str, str | None]]], action: str) -> list[tuple[str, str | None]]:
    """The hidden fields of the first form that goes to a path."""
    start = next(at for at, (tag, attrs) in enumerate(elements) if tag == "form" and attrs.get("action") == action)
    inputs = []
    for tag, attrs in elements[start + 1 :]:
        if tag == "form":
            break
        if tag == "input":
            inputs.append((str(attrs.get("name")), attrs.get("value")))
    return inputs


def test_the_admins_of_a_namespace_see_who_read_what(
    hub: Running, visitor: Visitor, database: HubDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(namespace_settings, "_MAX_READS", 2)
    digest = f"sha256:{'ab' * 32}"
    reads = [
        ("team/sql", "ada", "192.0.2.7"),
        ("team/sql", "", "192.0.2.0/24"),
        ("team/chat", "ada", "::1"),
        ("red/x", "bob", ""),
    ]
    sql = "INSERT INTO reads (day, name, digest, account, protocol, address, count, time) VALUES (?, ?, ?, ?, 'hf', ?, 3, ?)"
    for number, (name, account, address) in enumerate(reads):
        database.execute(sql, "2026-12-01", name, digest, account, address, 1_000.5 + number)
    admin, path = person(visitor, database, "ada", team="admin"), "/-/namespaces/team/reads"
    assert path in admin.get("/-/namespaces/team").html.values("a", "href")

    def names(page: Answer) -> list[str]:
        return [
            address for address in page.html.values("a", "href") if address.count("/") == 2 and not address.startswith("/-/")
        ]

    newest = admin.get(path)
    assert (names(newest), "192.0.2.0/24" in newest.text) == (["/team/chat", "/team/sql"], True)
    (following,) = (address for address in newest.html.values("a", "href") if "before=" in address)
    assert (names(admin.get(following)), "192.0.2.7" in admin.get(following).text) == (["/team/sql"], True)
    assert names(admin.get(f"{path}?name=team/chat")) == ["/team/chat"]
    assert names(admin.get(f"{path}?account=bob")) == []
    assert [admin.get(f"{path}?{query}").status for query in ("name=red/x", "before=x")] == [400, 400]
    assert person(visitor, database, "eve", team="write").get(path).status == 403
    assert visitor.get(path).headers["location"].startswith("/-/sign-in")

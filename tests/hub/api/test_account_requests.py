"""People manage what their role lets them: no route gives a right that the client lacks, and each change is in the audit log.

The routes are those of the API, so that a new one is under the same tests.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from adapterhub.hub import access_control
from adapterhub.hub.accounts import access_tokens, accounts, audit_log, sessions
from adapterhub.hub.administration import own_tokens
from adapterhub.hub.api.routes import routes
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.storage.from_settings import open_database
from adapterhub.ref import Ref
from tests.hub.conftest import Running, serving
from tests.support.hub_tenants import Tenant

API = "/api/adapterhub/v1"
# What admins of the hub alone may do, and what everybody may do for themselves.
OF_THE_HUB = ("accounts", "tokens", "admissions", "storage", "audit", "reads")
OWN = "account"
MANAGING = sorted(
    (method, route.path)  # type: ignore[attr-defined]
    for route in routes()
    if re.match(rf"{API}/(namespaces|account|{'|'.join(OF_THE_HUB)})(/|$)", route.path)  # type: ignore[attr-defined]
    for method in route.methods - {"HEAD"}  # type: ignore[attr-defined]
)


@pytest.fixture(autouse=True)
def _settings_are_read_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_control, "_TTL", 0.0)


@pytest.fixture
def database(hub: Running) -> Iterator[HubDatabase]:
    with closing(open_database(hub.settings)) as tables:
        yield tables


class Person(Tenant):
    """A client with a personal token, which may do what the account may; `options` limit it."""

    def __init__(
        self, hub: Running, account: str, *, namespaces: tuple[str, ...] = (), token_role: str = "admin", **roles: str
    ) -> None:
        self.hub, self.name = hub, account
        with closing(open_database(hub.settings)) as tables:
            if not tables.select("SELECT 1 FROM accounts WHERE name = ?", account):
                accounts.add(tables, account)
            for namespace, role in roles.items():
                accounts.set_member(tables, "*" if namespace == "everywhere" else namespace, account, role)
            options: Any = {"kind": access_tokens.PERSONAL, "namespaces": namespaces}
            self.token = access_tokens.issue(tables, account, token_role, **options)[0]

    def put(self, path: str, **document: Any) -> Any:
        return self.request("PUT", API + path, json=document)

    def send(self, path: str, **document: Any) -> Any:  # type: ignore[override]
        return self.request("POST", API + path, json=document)

    def delete(self, path: str) -> Any:
        return self.request("DELETE", API + path)

    def show(self, path: str) -> Any:
        return self.get(API + path).json()


def path_of(route: str) -> str:
    """The path of a route about the namespace `team`."""
    return route.replace("{namespace}", "team").replace("{account}", "ada").replace("{ident}", "1")


def test_there_are_routes_to_manage() -> None:
    assert len(MANAGING) > 30


# ---- who may


@pytest.mark.parametrize(("method", "route"), MANAGING)
def test_nobody_manages_what_they_have_no_role_for(hub: Running, method: str, route: str) -> None:
    writer = Person(hub, "ada", team="write")
    tokens = [hub.make_token("svc", "write"), Person(hub, "eve", other="admin").token]
    tokens += [
        Person(hub, "root", everywhere="admin", **limits).token
        for limits in ({"namespaces": ("other",)}, {"token_role": "write"})
    ]
    url = path_of(route)
    assert writer.request(method, url, headers={"authorization": ""}).status_code == 401
    if route.startswith(f"{API}/{OWN}/") or route == f"{API}/{OWN}":
        return
    for token in (writer.token, *tokens):
        answer = writer.request(method, url, json={}, headers={"authorization": f"Bearer {token}"})
        assert (answer.status_code, answer.json()["kind"]) == (403, "denied"), url


@pytest.mark.parametrize(("method", "route"), [pair for pair in MANAGING if not pair[1].startswith(f"{API}/namespaces")])
def test_an_admin_of_a_namespace_does_not_manage_the_hub(hub: Running, method: str, route: str) -> None:
    if route.startswith((f"{API}/account/", f"{API}/account")) and not route.startswith(f"{API}/accounts"):
        return
    answer = Person(hub, "ada", team="admin").request(method, path_of(route), json={})
    assert answer.status_code == 403


@pytest.mark.parametrize(("method", "route"), [pair for pair in MANAGING if "{namespace}" in pair[1]])
def test_an_admin_of_a_namespace_manages_it(hub: Running, method: str, route: str) -> None:
    answer = Person(hub, "ada", team="admin").request(method, path_of(route), json={})
    assert (answer.status_code == 403) == (route.endswith("/quota")), answer.text


# ---- the own profile


def test_somebody_sets_a_profile_which_clients_of_the_hugging_face_hub_show(hub: Running, adapter: Callable[..., Path]) -> None:
    ada = Person(hub, "ada")
    profile = {"full_name": "Ada Lovelace", "about": "Numbers.\nAnd music.", "link": "https://example.org/ada"}
    assert ada.show("/account")["profile"] == dict.fromkeys(profile, "")
    assert ada.put("/account/profile", **profile).json() == profile
    assert ada.show("/account")["profile"] == profile
    with hub.registry() as registry:
        registry.push(adapter(1), Ref("ada/sql"))
    api = HfApi(hub.url, ada.token)
    overview = api.get_user_overview("ada")
    assert (api.whoami()["fullname"], overview.fullname, overview.details) == ("Ada Lovelace",) * 2 + ("Numbers.\nAnd music.",)
    assert ada.put("/account/profile").json() == dict.fromkeys(profile, "")
    assert api.whoami()["fullname"] == "ada"


@pytest.mark.parametrize(
    ("limits", "document", "status"),
    [
        ({"token_role": "read"}, {}, 403),
        ({"namespaces": ("team",)}, {}, 403),
        ({"token_role": "write"}, {}, 200),
        ({}, {"full_name": "a\nb"}, 400),
        ({}, {"full_name": "x" * 101}, 400),
        ({}, {"about": "x" * 1001}, 400),
        ({}, {"about": 7}, 400),
        ({}, {"link": "javascript:alert(1)"}, 400),
        ({}, {"link": "https://"}, 400),
        ({}, {"link": "https://[x"}, 400),
        ({}, {"link": "https://x/ y"}, 400),
        ({}, {"link": "https://ada:secret@example.org/"}, 400),
        ({}, {"link": "https://x/" + "y" * 300}, 400),
        ({}, {"about": "half a character: \ud800"}, 400),
    ],
)
def test_a_profile_is_set_by_its_account_alone_in_short_texts(
    hub: Running, limits: dict[str, Any], document: dict[str, Any], status: int
) -> None:
    assert Person(hub, "ada", team="write", **limits).put("/account/profile", **document).status_code == status


def test_a_service_has_no_profile_and_that_of_a_removed_account_goes(hub: Running, database: HubDatabase) -> None:
    ci = Tenant(hub, "ada")
    assert ci.request("PUT", f"{API}/account/profile", json={}).status_code == 403
    Person(hub, "bob").put("/account/profile", full_name="Bob")
    accounts.remove(database, "bob")
    accounts.add(database, "bob")
    assert Person(hub, "bob").show("/account")["profile"]["full_name"] == ""


# ---- own tokens


def test_somebody_makes_lists_and_revokes_their_tokens(hub: Running, database: HubDatabase) -> None:
    ada = Person(hub, "ada", team="write")
    answer = ada.send("/account/tokens", name="laptop", role="write", namespaces=["team"], days=30)
    assert (answer.status_code, answer.headers["cache-control"]) == (201, "no-store")
    new_token = answer.json()
    identity = access_tokens.identify(database, new_token["token"])
    assert identity
    assert (identity.role_in("team"), identity.role_in("ada"), round((identity.expires or 0) - new_token["created"])) == (
        "write",
        "",
        30 * 86400,
    )
    listed = ada.show("/account/tokens")["tokens"]
    assert [token["name"] for token in listed] == ["", "laptop"]
    assert new_token["token"] not in str(listed)
    assert ada.delete(f"/account/tokens/{new_token['id']}").status_code == 200
    assert access_tokens.identify(database, new_token["token"]) is None
    assert ada.delete(f"/account/tokens/{new_token['id']}").json()["code"] == "no-such-number"


@pytest.mark.parametrize(
    ("limits", "document", "status"),
    [
        ({"token_role": "read"}, {"role": "write"}, 403),
        ({"token_role": "write"}, {"role": "admin"}, 403),
        ({"namespaces": ("team",)}, {"namespaces": ["other"]}, 403),
        ({"namespaces": ("team/sql",)}, {"namespaces": ["team"]}, 403),
        ({"namespaces": ("team/sql",)}, {"namespaces": ["team/sql", "team/x"]}, 403),
        ({"namespaces": ("team",)}, {"namespaces": ["team/sql"]}, 201),
        ({}, {"namespaces": ["strangers"]}, 403),
        ({}, {"namespaces": ["strangers/sql"]}, 403),
        ({}, {"role": "root"}, 400),
        ({}, {"name": ""}, 400),
        ({}, {"name": "a\nb"}, 400),
        ({}, {"days": 0}, 400),
        ({}, {"days": 1e9}, 400),
        ({}, {"days": True}, 400),
        ({}, {"namespaces": ["*"]}, 400),
        ({}, {"namespaces": "team"}, 400),
    ],
)
def test_a_token_makes_none_that_may_do_more(hub: Running, limits: Any, document: Any, status: int) -> None:
    ada = Person(hub, "ada", team="admin", **limits)
    assert ada.send("/account/tokens", **{"name": "x", "role": "read", **document}).status_code == status


def test_a_limited_token_hands_its_limits_on_and_sees_no_others(hub: Running, database: HubDatabase) -> None:
    Person(hub, "ada")
    limited = Person(hub, "ada", namespaces=("team",))
    new_token = limited.send("/account/tokens", name="x", role="read").json()
    assert new_token["namespaces"] == ["team"]
    assert {token["id"] for token in limited.show("/account/tokens")["tokens"]} == {new_token["id"], new_token["parent"]}
    other_id = next(token.id for token in access_tokens.list_tokens(database, account="ada") if not token.namespaces)
    assert limited.delete(f"/account/tokens/{other_id}").status_code == 404
    access_tokens.revoke(database, new_token["parent"])
    assert access_tokens.identify(database, new_token["token"]) is None


def test_a_token_of_a_service_makes_tokens_of_it(hub: Running, database: HubDatabase) -> None:
    ci = Tenant(hub, "ci")
    new_token = ci.post(f"{API}/account/tokens", json={"name": "x", "role": "write"}).json()
    identity = access_tokens.identify(database, new_token["token"])
    assert identity
    assert (identity.role_in("ci"), identity.role_in("team")) == ("write", "")


def test_what_a_token_makes_ends_with_it(hub: Running, database: HubDatabase) -> None:
    ada = Person(hub, "ada")
    ada.token = access_tokens.create(database, "ada", "admin", kind=access_tokens.PERSONAL, lifetime=86400.0)
    late = ada.send("/account/tokens", name="x", role="read", days=2)
    assert (late.status_code, "this token ends in 1.0 days" in late.json()["what"]) == (400, True)
    new_token = ada.send("/account/tokens", name="x", role="read").json()
    assert new_token["expires"] is not None
    with database.transaction():
        cookie_token = access_tokens.issue(database, "ada", "admin", kind=access_tokens.BROWSER, lifetime=sessions.SIGNED_IN)[1]
    session = access_tokens.identify_by_id(database, cookie_token)
    _, token = own_tokens.create_token(database, session, own_tokens.TokenOptions("laptop", "read"))
    assert (token.expires, token.parent) == (None, None)


def test_an_account_has_a_limited_number_of_tokens(hub: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_tokens, "MAX_TOKENS", 2)
    ada = Person(hub, "ada")
    statuses = [ada.send("/account/tokens", name="x", role="read").status_code for _ in range(2)]
    assert statuses == [201, 400]


# ---- members


def test_an_admin_gives_and_takes_roles_that_hold_at_once(hub: Running) -> None:
    admin, ada = Person(hub, "boss", team="admin"), Person(hub, "ada")
    Tenant(hub, "team").create("sql", private=True)
    assert ada.get("/api/models/team/sql").status_code == 404
    assert admin.put("/namespaces/team/members/ada", role="read").status_code == 200
    assert ada.get("/api/models/team/sql").status_code == 200
    assert [member["account"] for member in admin.show("/namespaces/team/members")["members"]] == ["ada", "boss"]
    assert admin.delete("/namespaces/team/members/ada").status_code == 200
    assert ada.get("/api/models/team/sql").status_code == 404
    assert admin.put("/namespaces/team/members/nobody", role="read").json()["code"] == "no-such-account"


def test_the_last_admin_goes_only_if_that_is_said(hub: Running, database: HubDatabase) -> None:
    boss, root = Person(hub, "boss", team="admin"), Person(hub, "root", everywhere="admin")
    lowered = boss.put("/namespaces/team/members/boss", role="write")
    assert (lowered.status_code, lowered.json()["code"]) == (409, "last-admin")
    for path in ("/namespaces/team/members/boss", "/accounts/boss", "/accounts/root/role"):
        answer = root.delete(path)
        assert (answer.status_code, answer.json()["code"]) == (409, "last-admin"), path
    assert root.put("/accounts/boss/disabled").json()["code"] == "last-admin"
    Person(hub, "ada", team="admin")
    assert boss.put("/namespaces/team/members/boss", role="write").status_code == 200
    assert root.put("/accounts/ada/disabled?force=true").status_code == 200
    assert accounts.members(database, "team")[0].role == "admin"


def test_the_owner_is_an_admin_of_the_own_namespace_whoever_else_is(hub: Running) -> None:
    ada = Person(hub, "ada")
    Person(hub, "eve", ada="admin")
    assert ada.delete("/namespaces/ada/members/eve").status_code == 200


# ---- settings, quotas, keys


def test_readers_change_without_the_other_settings(hub: Running, database: HubDatabase) -> None:
    accounts.set_namespace(database, accounts.Namespace("team", "anyone", 5, 6, adapters_only=True))
    answer = Person(hub, "ada", team="admin").request("PATCH", f"{API}/namespaces/team", json={"readers": "members"})
    assert answer.json() == {"name": "team", "readers": "members", "max_bytes": 5, "max_files": 6, "adapters_only": True}


def test_a_quota_is_asked_for_and_given_by_an_admin_of_the_hub(hub: Running, database: HubDatabase) -> None:
    ada, root = Person(hub, "ada", team="admin"), Person(hub, "root", everywhere="admin")
    assert ada.put("/namespaces/team/quota-request", max_bytes=10**9, reason="more data").status_code == 200
    (quota_request,) = root.show("/storage")["quota_requests"]
    assert (quota_request["namespace"], quota_request["account"], quota_request["max_bytes"], quota_request["reason"]) == (
        "team",
        "ada",
        10**9,
        "more data",
    )
    assert root.put("/namespaces/team/quota", max_bytes=quota_request["max_bytes"]).status_code == 200
    assert accounts.namespace_settings(database, "team").max_bytes == 10**9
    assert ada.show("/namespaces/team")["quota_request"] is None
    for limit in (0, -1, 1 << 70, "1", 1.5, True):
        assert root.put("/namespaces/team/quota", max_bytes=limit).status_code == 400, limit


def test_a_deploy_key_is_of_the_namespace_and_of_no_other(hub: Running, database: HubDatabase) -> None:
    ada, boss = Person(hub, "ada", team="admin"), Person(hub, "boss", team="admin")
    deploy_key = ada.send("/namespaces/team/deploy-keys", name="ci", role="write", namespaces=["team/sql"]).json()
    identity = access_tokens.identify(database, deploy_key["token"])
    assert identity
    assert (identity.role_in("team/sql"), identity.role_in("team"), identity.role_in("ada")) == ("write", "", "")
    for document in (
        {"role": "admin"},
        {"role": "read", "namespaces": ["ada"]},
        {"role": "read", "namespaces": ["team", "other/x"]},
    ):
        assert ada.send("/namespaces/team/deploy-keys", name="x", **document).status_code in (400, 403)
    assert Person(hub, "eve", other="admin").delete(f"/namespaces/other/deploy-keys/{deploy_key['id']}").status_code == 404
    assert [key["id"] for key in boss.show("/namespaces/team/deploy-keys")["deploy_keys"]] == [deploy_key["id"]]
    # The role of its maker may go, not the account.
    boss.delete("/namespaces/team/members/ada")
    assert access_tokens.identify(database, deploy_key["token"])
    boss.delete(f"/namespaces/team/deploy-keys/{deploy_key['id']}")
    assert access_tokens.identify(database, deploy_key["token"]) is None


def test_a_webhook_leads_to_this_network_for_admins_of_the_hub_alone(hub: Running) -> None:
    ada, root = Person(hub, "ada", team="admin"), Person(hub, "root", everywhere="admin")
    webhook = ada.send("/namespaces/team/webhooks", url="https://hooks.example/secret-path").json()
    assert len(webhook["secret"]) == 64
    listing = ada.show("/namespaces/team/webhooks")
    assert [hook["url"] for hook in listing["webhooks"]] == ["https://hooks.example/secret-path"]
    assert webhook["secret"] not in str(listing)
    assert ada.send("/namespaces/team/webhooks", url="http://127.0.0.1/x", private=True).status_code == 403
    assert root.send("/namespaces/team/webhooks", url="http://127.0.0.1/x", private=True).status_code == 201
    assert Person(hub, "eve", other="admin").delete(f"/namespaces/other/webhooks/{webhook['id']}").status_code == 404
    assert ada.delete(f"/namespaces/team/webhooks/{webhook['id']}").status_code == 200


def test_a_publisher_is_of_an_issuer_that_the_hub_trusts(hub: Running) -> None:
    ada, root = Person(hub, "ada", team="admin"), Person(hub, "root", everywhere="admin")
    job: Any = {"scope": "team/sql", "issuer": "https://gitlab.com", "claims": {"project_path": "org/x"}}
    publisher = ada.send("/namespaces/team/publishers", **job).json()
    (listed_publisher,) = ada.show("/namespaces/team/publishers")["publishers"]
    assert (listed_publisher["id"], listed_publisher["scope"], listed_publisher["account"]) == (
        publisher["id"],
        "team/sql",
        "ada",
    )
    inside = {**job, "issuer": "https://10.0.0.1"}
    assert ada.send("/namespaces/team/publishers", **inside).status_code == 403
    assert root.send("/namespaces/team/publishers", **inside).status_code == 201
    assert ada.send("/namespaces/team/publishers", **{**job, "scope": "other/sql"}).status_code == 403
    assert ada.send("/namespaces/team/publishers", **{**job, "claims": {"aud": "x"}}).status_code == 400
    assert Person(hub, "eve", other="admin").delete(f"/namespaces/other/publishers/{publisher['id']}").status_code == 404
    assert ada.delete(f"/namespaces/team/publishers/{publisher['id']}").status_code == 200


# ---- the hub


def test_somebody_who_is_invited_signs_in_and_makes_tokens(hub: Running) -> None:
    root = Person(hub, "root", everywhere="admin")
    invited = root.send("/accounts", account="ada", roles={"team": "write"}).json()
    ada = Person(hub, "eve")
    ada.token = invited["token"]
    assert ada.show("/account")["roles"] == {"team": "write", "ada": "admin"}
    assert ada.send("/account/tokens", name="x", role="write").status_code == 201
    assert root.send("/accounts", account="ada").status_code == 409
    assert root.send("/accounts", account="bob", roles={"team": "king"}).status_code == 400
    assert "bob" not in str(root.show("/accounts"))


def test_a_disabled_account_is_refused_everywhere_until_it_is_enabled(hub: Running, database: HubDatabase) -> None:
    root, ada = Person(hub, "root", everywhere="admin"), Person(hub, "ada", team="write")
    cookie = sessions.sign_in(database, "ada")
    assert root.put("/accounts/ada/disabled").status_code == 200
    assert ada.get(f"{API}/account").status_code == 401
    assert sessions.session_identity(database, cookie) is None
    assert [account["disabled"] for account in root.show("/accounts")["accounts"] if account["name"] == "ada"] == [True]
    assert root.delete("/accounts/ada/disabled").status_code == 200
    assert ada.show("/account")["roles"] == {"team": "write", "ada": "admin"}


def test_a_rule_gives_a_group_its_role(hub: Running) -> None:
    root = Person(hub, "root", everywhere="admin")
    rule: Any = {"issuer": "https://login.example", "claims": {"groups": "ml"}, "namespace": "team", "role": "write"}
    answer = root.send("/admissions", **rule)
    assert answer.status_code == 201
    assert root.show("/admissions")["admissions"] == [{"id": answer.json()["id"], **rule}]
    assert root.send("/admissions", **{**rule, "claims": {}}).status_code == 400
    assert root.delete(f"/admissions/{answer.json()['id']}").status_code == 200


def test_each_change_is_a_row_with_who_and_what_and_without_secrets(hub: Running, database: HubDatabase) -> None:
    boss = Person(hub, "boss", team="admin")
    Person(hub, "ada")
    boss.put("/namespaces/team/members/ada", role="write")
    token = boss.send("/account/tokens", name="my laptop role=admin", role="read").json()["token"]
    hook = boss.send("/namespaces/team/webhooks", url="https://hooks.example/secret-path").json()
    rows = [(row.action, row.name, row.account) for row in audit_log.events(database, limit=3)]
    assert rows[1:] == [("api.create_token", "boss", "boss"), ("api.set_member", "team", "boss")]
    details = " ".join(row.detail for row in audit_log.events(database, limit=3))
    assert "account=ada role=write" in details
    assert 'name="my laptop role=admin" role=read' in details
    for secret in (token, hook["secret"], "secret-path"):
        assert secret not in details
    events = boss.show("/audit?name=team")["events"]
    assert [row["action"] for row in events if row["action"] == "api.set_member"] == ["api.set_member"]
    assert boss.get(f"{API}/audit").status_code == 403


def test_a_change_holds_in_every_process_within_five_seconds(
    hub: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert access_control._TTL <= 5
    monkeypatch.setattr(access_control, "_TTL", 0.0)
    with serving(hub.folder) as other_hub:
        boss, ada = Person(hub, "boss", team="admin"), Person(hub, "ada")
        elsewhere = Person(other_hub, "ada")
        elsewhere.token = ada.token
        assert elsewhere.show("/account")["roles"] == {"ada": "admin"}
        boss.put("/namespaces/team/members/ada", role="write")
        assert elsewhere.show("/account")["roles"] == {"ada": "admin", "team": "write"}

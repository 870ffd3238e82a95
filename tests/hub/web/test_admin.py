"""What only admins may see and do."""

from __future__ import annotations

from contextlib import closing

import pytest

from adapterhub.hub.accounts import access_tokens, accounts, audit_log
from adapterhub.hub.accounts.accounts import Namespace
from adapterhub.hub.hub_database import HubDatabase
from tests.hub.conftest import Running
from tests.hub.web.conftest import Visitor
from tests.hub.web.test_pages import Push


def test_the_administration_is_for_admins_of_the_whole_hub(hub: Running, visitor: Visitor) -> None:
    assert visitor.get("/-/admin").headers["location"] == "/-/sign-in?next=%2F-%2Fadmin"
    for token in (hub.token, hub.make_token("eve", "admin", namespaces=["team"])):
        signed_in = visitor.signed_in(token)
        assert signed_in.get("/-/admin").status == 403
        assert signed_in.post("/-/admin/revoke", {"csrf": signed_in.csrf(), "token": "1"}).status == 403
        settled = {"csrf": signed_in.csrf(), "namespace": "team", "artifacts": "adapters"}
        assert signed_in.post("/-/admin/settle", settled).status == 403


def test_an_admin_settles_which_artifacts_a_namespace_takes(hub: Running, visitor: Visitor, push: Push) -> None:
    push("team/sql")
    admin = visitor.signed_in(hub.make_token("root", "admin"))
    with closing(HubDatabase(hub.folder)) as database:
        accounts.set_namespace(database, Namespace("team", "members", 50_000_000, 20))
        for only in (True, False):
            page = admin.get("/-/admin").html
            (form,) = [attrs for tag, attrs in page.elements if tag == "form" and attrs.get("action") == "/-/admin/settle"]
            (namespace, artifacts) = (
                next(attrs["value"] for tag, attrs in page.elements if tag == "input" and attrs.get("name") == name)
                for name in ("namespace", "artifacts")
            )
            assert form["method"] == "post"
            fields = {"csrf": admin.csrf(), "namespace": str(namespace), "artifacts": str(artifacts)}
            assert admin.post("/-/admin/settle", {**fields, "csrf": ""}).status == 403
            assert admin.post("/-/admin/settle", fields).status == 303
            assert accounts.namespace_settings(database, "team") == Namespace("team", "members", 50_000_000, 20, only)
        assert [event.name for event in audit_log.events(database) if event.action == "web.settle"] == ["team", "team"]


@pytest.mark.parametrize(
    ("namespace", "artifacts", "words"),
    [
        ("team", "", "artifacts: '' is not one of any, adapters"),
        ("team", "all", "artifacts: 'all' is not one of any, adapters"),
        ("", "any", ""),
        ("Team/x", "any", ""),
        ("x" * 5000, "any", ""),
    ],
)
def test_what_no_form_says_settles_nothing(hub: Running, visitor: Visitor, namespace: str, artifacts: str, words: str) -> None:
    admin = visitor.signed_in(hub.make_token("root", "admin"))
    fields = {"csrf": admin.csrf(), "namespace": namespace, "artifacts": artifacts}
    refused = admin.post("/-/admin/settle", fields)
    assert (refused.status, words in refused.text) == (400, True), refused.text
    with closing(HubDatabase(hub.folder)) as database:
        assert accounts.namespaces(database) == []


def test_an_admin_sees_tokens_by_their_first_characters_and_revokes_them(hub: Running, visitor: Visitor) -> None:
    admin = visitor.signed_in(hub.make_token("root", "admin"))
    page = admin.get("/-/admin")
    assert hub.token[:8] in page.text
    assert hub.token not in page.body.decode()
    with closing(HubDatabase(hub.folder)) as database:
        (mine,) = [token.id for token in access_tokens.list_tokens(database) if token.account == "alice"]
        fields = {"csrf": admin.csrf(), "token": str(mine)}
        assert admin.post("/-/admin/revoke", {**fields, "csrf": ""}).status == 403
        assert admin.post("/-/admin/revoke", fields).status == 303
        assert access_tokens.identify(database, hub.token) is None
    response = admin.post("/-/admin/revoke", fields)
    assert (response.status, "no such token. List the tokens" in response.text) == (404, True)
    assert admin.post("/-/admin/revoke", {**fields, "token": "x"}).status == 400


def test_an_admin_of_their_own_namespace_is_none_of_the_hub(hub: Running, visitor: Visitor) -> None:
    with closing(HubDatabase(hub.folder)) as database:
        accounts.add(database, "ada")
        token = access_tokens.create(database, "ada", "admin", kind=access_tokens.PERSONAL)
        ada = visitor.signed_in(token)
        assert ada.get("/-/admin").status == 403
        assert "/-/admin" not in ada.get("/").html.values("a", "href")
        assert ada.post("/-/admin/revoke", {"csrf": ada.csrf(), "token": "1"}).status == 403
        accounts.set_member(database, accounts.EVERYWHERE, "ada", "admin")
    assert visitor.signed_in(token).get("/-/admin").status == 200


def test_the_administration_has_roles_quotas_and_the_audit_log(hub: Running, visitor: Visitor) -> None:
    with closing(HubDatabase(hub.folder)) as database:
        accounts.add(database, "ada")
        accounts.set_member(database, "team", "ada", "write")
        accounts.set_namespace(database, Namespace("team", "members", 50_000_000, 20))
    admin = visitor.signed_in(hub.make_token("root", "admin"))
    page = admin.get("/-/admin")
    for text in ("team: write", "50.0 MB 20 files", "members", "web.sign_in", "127.0.0.1"):
        assert text in page.text
    assert "sign_in" not in admin.get("/-/admin?audit=team").text

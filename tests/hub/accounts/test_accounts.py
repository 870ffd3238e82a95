"""Accounts and their roles: a token does at most what its account may, and a namespace is read by whom it is for."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from adapterhub.hub import hub_database as database_module
from adapterhub.hub.accounts import access_tokens, accounts
from adapterhub.hub.accounts.accounts import Namespace
from adapterhub.hub.hub_database import MIGRATIONS, HubDatabase
from adapterhub.ref import Ref
from adapterhub_converters.errors import AdapterhubError, ConflictError, NotFoundError, UsageError
from tests.conftest import Run
from tests.hub.conftest import Running, client


def person(hub: Running, name: str, **roles: str) -> str:
    """An account with roles; return its token."""
    with closing(HubDatabase(hub.folder)) as database:
        accounts.add(database, name)
        for namespace, role in roles.items():
            accounts.set_member(database, namespace, name, role)
        return access_tokens.create(database, name, "admin", kind=access_tokens.PERSONAL)


def as_whom(hub: Running, token: str) -> Any:
    return client(Running(hub.url, hub.settings, token), hub.folder)


def test_a_person_writes_where_they_have_the_role(hub: Running) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    ada = as_whom(hub, person(hub, "ada", team="write", other="read"))
    ada.create_repo("ada/own")
    ada.create_repo("team/sql")
    with pytest.raises(HfHubHTTPError, match="this needs the role write in other: the token of ada has the role read there"):
        ada.create_repo("other/sql")
    with pytest.raises(HfHubHTTPError, match="has no role there"):
        ada.create_repo("third/sql")


def test_a_token_is_no_more_than_it_was_made_for(hub: Running) -> None:
    person(hub, "ada", team="write")
    with closing(HubDatabase(hub.folder)) as database:
        reader = access_tokens.identify(database, access_tokens.create(database, "ada", "read", kind=access_tokens.PERSONAL))
        limited = access_tokens.identify(
            database, access_tokens.create(database, "ada", "admin", namespaces=["team"], kind=access_tokens.PERSONAL)
        )
    assert reader
    assert limited
    assert (reader.role_in("team"), reader.role_in("ada")) == ("read", "read")
    assert (limited.role_in("team"), limited.role_in("ada")) == ("write", "")


def test_a_role_everywhere_is_one_in_each_namespace(tmp_path: Path) -> None:
    with closing(HubDatabase(tmp_path)) as database:
        accounts.add(database, "root")
        accounts.set_member(database, "*", "root", "admin")
        identity = access_tokens.identify(
            database, access_tokens.create(database, "root", "admin", kind=access_tokens.PERSONAL)
        )
    assert identity
    assert identity.has_role("admin", "any")


def test_the_command_line_tells_who_is_the_last_admin(run: Run, tmp_path: Path) -> None:
    with closing(HubDatabase(tmp_path)) as database:
        accounts.add(database, "ada")
        accounts.set_member(database, "team", "ada", "admin")
        for words in (
            ("member", "rm", "team", "ada"),
            ("member", "set", "team", "ada", "--role", "read"),
            ("user", "rm", "ada"),
        ):
            refused = run("hub", *words, "--registry", str(tmp_path), code=7)
            assert "is the last admin of team" in refused.stderr
        run("hub", "user", "rm", "ada", "--force", "--registry", str(tmp_path))
        assert accounts.members(database, "team") == []


def test_a_service_keeps_the_role_of_its_token(hub: Running) -> None:
    as_whom(hub, hub.make_token("ci", "write")).create_repo("any/sql")


def test_a_removed_account_is_refused_and_comes_back_without_what_it_had(tmp_path: Path) -> None:
    with closing(HubDatabase(tmp_path)) as database:
        accounts.add(database, "ada")
        accounts.set_member(database, "team", "ada", "write")
        token = access_tokens.create(database, "ada", "admin", kind=access_tokens.PERSONAL)
        accounts.remove(database, "ada")
        assert access_tokens.identify(database, token) is None
        assert accounts.list_accounts(database) == []
        with pytest.raises(NotFoundError, match="ada: no account with this name"):
            accounts.set_member(database, "team", "ada", "read")
        with pytest.raises(NotFoundError, match="ada in team: no such member") as error:
            accounts.remove_member(database, "team", "ada")
        assert error.value.code == "no-such-account"
        accounts.add(database, "ada")
        assert access_tokens.identify(database, token) is None
        assert [(account.name, account.roles) for account in accounts.list_accounts(database)] == [("ada", {})]
        with pytest.raises(ConflictError):
            accounts.add(database, "ada")


@pytest.mark.parametrize("name", ["", "a/b", "..", "Ada Lovelace", "*", "a" * 300])
def test_a_name_that_no_namespace_may_have_is_refused(tmp_path: Path, name: str) -> None:
    with closing(HubDatabase(tmp_path)) as database, pytest.raises(AdapterhubError):
        accounts.add(database, name)


@pytest.mark.parametrize(
    ("readers", "nobody", "stranger", "reader"),
    [("anyone", True, True, True), ("accounts", False, True, True), ("members", False, False, True)],
)
def test_a_namespace_is_read_by_whom_it_is_for(
    hub: Running, hf: Any, readers: str, nobody: bool, stranger: bool, reader: bool
) -> None:
    with closing(HubDatabase(hub.folder)) as database:
        accounts.set_namespace(database, Namespace("team", readers))
    hf.create_repo("team/sql")
    read_access = {
        "nobody": as_whom(hub, "").repo_exists("team/sql", token=False),
        "stranger": as_whom(hub, person(hub, "eve")).repo_exists("team/sql"),
        "reader": as_whom(hub, person(hub, "ada", team="read")).repo_exists("team/sql"),
    }
    assert read_access == {"nobody": nobody, "stranger": stranger, "reader": reader}


def test_a_namespace_is_for_no_other_readers(tmp_path: Path) -> None:
    says = "readers: 'all' is not one of anyone, accounts, members"
    with closing(HubDatabase(tmp_path)) as database, pytest.raises(UsageError, match=says):
        accounts.set_namespace(database, Namespace("team", "all"))


def test_a_private_adapter_is_seen_by_members_only(hub: Running, hf: Any) -> None:
    hf.create_repo("team/sql", private=True)
    assert not as_whom(hub, person(hub, "eve")).repo_exists("team/sql")
    assert as_whom(hub, person(hub, "ada", team="read")).repo_exists("team/sql")


def test_whoami_names_the_namespaces_of_a_person(hub: Running) -> None:
    profile = as_whom(hub, person(hub, "ada", team="write", other="read")).whoami()
    assert (profile["name"], [org["name"] for org in profile["orgs"]]) == ("ada", ["other", "team"])


def test_the_log_of_a_name_has_who_committed_and_why(hub: Running, adapter: Callable[..., Path]) -> None:
    ada = as_whom(hub, person(hub, "ada", team="write"))
    ada.create_repo("team/sql")
    ada.upload_folder(folder_path=adapter(1), repo_id="team/sql", commit_message="First try")
    ada.create_tag("team/sql", tag="prod")
    with hub.registry() as registry:
        entries = [(entry.op, entry.author, entry.message) for entry in registry.log(Ref("team/sql"))]
    assert sorted(entries) == [("push", "ada", "First try"), ("tag", "ada", "")]


def test_a_namespace_of_before_takes_any_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    added = next(number for number, migration in enumerate(MIGRATIONS) if "adapters_only" in migration)
    with monkeypatch.context() as older:
        older.setattr(database_module, "MIGRATIONS", MIGRATIONS[:added])
        with closing(HubDatabase(tmp_path)) as database:
            database.execute("INSERT INTO namespaces VALUES ('team', 'members', 5, NULL)")
    with closing(HubDatabase(tmp_path)) as database:
        assert accounts.namespace_settings(database, "team") == Namespace("team", "members", 5)
        accounts.set_namespace(database, Namespace("team", adapters_only=True))
        assert accounts.namespaces(database) == [Namespace("team", adapters_only=True)]


def test_the_commands_about_accounts_tell_what_to_do_next(run: Run, tmp_path: Path) -> None:
    """A secret is alone on stdout, for `$(…)`; no hint is about the other hub that a command without --registry takes."""
    empty = run("hub", "user", "list", "--registry", tmp_path / "elsewhere").stderr
    assert f"no accounts yet in the hub of {tmp_path / 'elsewhere'}; add one with `adapterhub hub user add NAME`" in empty
    result = run("hub", "user", "add", "ada", "--registry", tmp_path / "hub")
    assert (result.stdout[:3], result.stdout.count("\n")) == ("hf_", 1)
    assert result.stderr == "save it now, it is not shown again: anyone who has it can act as the account\n"
    missing = run("hub", "member", "set", "team", "bo", "--role", "read", "--registry", tmp_path / "hub", code=3).stderr
    assert missing.startswith("error: bo: no account with this name. `adapterhub hub user list --registry ")
    assert "` shows the accounts" in missing
    nobody = run("hub", "member", "list", "team", "--registry", tmp_path / "hub").stderr
    assert nobody == "nobody has a role in team; `adapterhub hub member set` gives one\n"
    run("hub", "member", "set", "team", "ada", "--role", "read", "--registry", tmp_path / "hub")
    assert run("hub", "member", "list", "team", "--registry", tmp_path / "hub").stdout == "ACCOUNT  ROLE\nada      read\n"
    twice = run("hub", "user", "add", "ada", "--registry", tmp_path / "hub", code=7).stderr
    assert "ada: an account with this name already exists. Choose another name" in twice
    slash = run("hub", "user", "add", "b/o", "--registry", tmp_path / "hub", code=2).stderr
    assert "b/o: is not a namespace. Write it without a slash, like team" in slash
    assert "HF_TOKEN" in run("hub", "token", "create", "--help").stdout


def test_the_size_of_a_namespace_is_written_as_sizes_are_elsewhere(run: Run, tmp_path: Path) -> None:
    limit = ("hub", "namespace", "set", "team", "--json", "--registry", tmp_path / "hub", "--max-size")
    for text, size in (("500M", 500 * 10**6), ("2GiB", 2 << 30), ("0", None)):
        assert json.loads(run(*limit, text).stdout)["max_bytes"] == size
    assert "--max-size: 'much' is not a size. Write it like" in run(*limit, "much", code=2).stderr


def test_a_persons_token_is_listed_with_no_role_of_its_own(run: Run, tmp_path: Path) -> None:
    registry_option = ("--registry", tmp_path / "hub")
    run("hub", "user", "add", "ada", *registry_option)
    run("hub", "token", "create", "ci", "--role", "admin", *registry_option)
    rows = {row.split()[1]: row for row in run("hub", "token", "list", *registry_option).stdout.splitlines()[1:]}
    assert ("as the account" in rows["ada"], "admin" in rows["ada"], "admin" in rows["ci"]) == (True, False, True)

"""What is hidden from a client follows what changes, whoever changes it, and is looked up once for all with the same roles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from adapterhub.hub import access_control
from adapterhub.hub.accounts import accounts
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.accounts.accounts import Namespace
from adapterhub.hub.hub import Hub
from adapterhub.hub.settings import HubSettings
from adapterhub.index import repository_rows
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.registry.repository_records import Repositories

MEMBER = Identity("ada", "read", roles={"team": "read"})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(access_control, "_TTL", 0.0)
    Registry.init(tmp_path / "hub").close()
    with closing(Hub(HubSettings(registry=tmp_path / "hub"))) as opened:
        yield opened


def set_private(repositories: Repositories, name: str, *, private: bool) -> None:
    repositories.change(name, lambda state: replace(state, private=private))


def hidden(hub: Hub, identity: Identity | None = None) -> set[str]:
    return {*hub.hidden_names(hub.workers.worker(), identity)}


def test_what_another_process_makes_private_or_public_or_removes_is_followed_at_once(hub: Hub) -> None:
    assert hidden(hub) == set()
    with Registry.open(hub.settings.registry) as registry:
        other_repositories = Repositories(registry)
        set_private(other_repositories, "team/secret", private=True)
        assert (hidden(hub), hidden(hub, MEMBER)) == ({"team/secret"}, set())
        set_private(other_repositories, "team/secret", private=False)
        set_private(other_repositories, "team/plans", private=True)
        assert hidden(hub) == {"team/plans"}
        other_repositories.remove("team/plans")
        assert hidden(hub) == set()


def test_a_token_with_a_role_of_its_own_sees_all_and_an_account_without_roles_nothing(hub: Hub) -> None:
    set_private(hub.workers.worker().repositories, "team/secret", private=True)
    assert [hidden(hub, replace(MEMBER, roles=roles)) for roles in (None, {}, None)] == [set(), {"team/secret"}, set()]


def test_a_token_for_one_repository_sees_that_and_no_other_of_its_namespace(hub: Hub) -> None:
    for name in ("team/a", "team/b"):
        set_private(hub.workers.worker().repositories, name, private=True)
    assert hidden(hub, replace(MEMBER, namespaces=("team/a",))) == {"team/b"}


def test_a_name_of_members_is_hidden_with_its_first_version_and_shown_once_all_may_read(
    hub: Hub, adapter: Callable[..., Path]
) -> None:
    accounts.set_namespace(hub.database, Namespace("team", "members"))
    assert hidden(hub) == set()
    with Registry.open(hub.settings.registry) as registry:
        registry.push(adapter(1), Ref("team/sql"))
    assert (hidden(hub), hidden(hub, MEMBER)) == ({"team/sql"}, set())
    accounts.set_namespace(hub.database, Namespace("team"))
    assert hidden(hub) == set()


def test_all_with_the_same_roles_share_one_set_until_something_changes(
    hub: Hub, adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = hub.workers.worker()
    worker.registry.push(adapter(1), Ref("team/sql"))
    set_private(worker.repositories, "team/secret", private=True)
    names = hub.hidden_names(worker, replace(MEMBER, account="bob", token=2))
    monkeypatch.setattr(repository_rows, "restricted", lambda _: pytest.fail("the rows were read again"))
    assert hub.hidden_names(worker, replace(MEMBER, token=3)) is names


def test_each_set_has_a_number_of_its_own(hub: Hub) -> None:
    worker = hub.workers.worker()
    before = hub.hidden(worker, None)
    set_private(worker.repositories, "team/secret", private=True)
    after = hub.hidden(worker, None)
    assert before.names != after.names
    assert before.serial != after.serial != hub.hidden(worker, MEMBER).serial

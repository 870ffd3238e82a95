"""The forms of the board do what the API does: asked of one decider, each with a reason, and webhooks are told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from adapterhub.hub import webhooks
from adapterhub.hub.accounts import access_tokens, audit_log
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.index import queries
from adapterhub.project import settings_file
from adapterhub.ref import Ref
from tests.hub.conftest import Running, serving
from tests.hub.web.conftest import Visitor, person
from tests.support.adapters import Make

from .test_adapter_forms import log, send

BOARD = "/team/sql/channels"


@pytest.fixture
def hub(tmp_path: Path, make: Make) -> Iterator[Running]:
    """A hub where prod needs the approval of another, with two versions by alice, the first of which is prod."""
    policy = settings_file.parse("[promote.prod.require]\napprovals = 1\nfrom_others = true\n", tmp_path / "a.toml").policy
    with serving(tmp_path / "hub", policy=policy) as running:
        with running.registry() as registry:
            registry.author = "alice"
            for seed in (1, 2):
                registry.push(make(f"a{seed}", seed), Ref("team/sql"))
            registry.tag(Ref("team/sql", number=1), "prod")
        yield running


@pytest.fixture
def database(hub: Running) -> Iterator[HubDatabase]:
    with closing(HubDatabase(hub.folder)) as tables:
        yield tables


@pytest.fixture
def ada(visitor: Visitor, database: HubDatabase) -> Visitor:
    return person(visitor, database, "ada", team="write")


@pytest.fixture
def bob(visitor: Visitor, database: HubDatabase) -> Visitor:
    return person(visitor, database, "bob", team="write")


def digest(hub: Running, number: int) -> str:
    with hub.registry() as registry:
        return str(registry.row(Ref("team/sql", number=number)).digest)


def prod(hub: Running) -> int:
    with hub.registry() as registry:
        return queries.tags(registry.index, "team/sql").get("prod", 0)


def test_a_version_goes_to_prod_and_back_by_forms_and_webhooks_are_told_of_each(
    hub: Running, ada: Visitor, bob: Visitor, database: HubDatabase
) -> None:
    webhooks.add(database, "team", "https://ci.example/hook")
    first, second = digest(hub, 1), digest(hub, 2)
    answer = send(bob, "approve", tag="prod", reference="v2", message="read it")
    assert (answer.status, answer.headers["location"]) == (303, f"{BOARD}#channel-prod")
    assert send(ada, "promote", tag="prod", reference="v2", at=first, message="as agreed").status == 303
    assert prod(hub) == 2
    assert send(ada, "rollback", tag="prod", at=second, message="wrong dates").status == 303
    assert prod(hub) == 1
    assert send(ada, "withdraw", tag="prod", reference="v2", message="leaked").status == 303
    with hub.registry() as registry:
        entries = list(reversed(registry.log(Ref("team/sql"))))[3:]
    assert [(entry.op, entry.author) for entry in entries] == [
        ("approve", "bob"), ("tag", "ada"), ("rollback", "ada"), ("tag", "ada"), ("withdraw", "ada"),
    ]  # fmt: skip
    assert [entry.message for entry in entries[1:3]] == ["as agreed", "wrong dates"]
    events = [delivery.event for delivery in webhooks.deliveries(database)][::-1][-5:]  # others may be as old as the webhook
    assert events == ["version.approved", "tag.moved", "tag.moved", "tag.moved", "version.withdrawn"]
    actions = [event.action for event in audit_log.events(database, limit=20) if event.action.startswith("forms.")]
    assert actions[::-1] == ["forms.approve", "forms.promote", "forms.rollback", "forms.withdraw"]


def test_each_needs_a_reason(hub: Running, ada: Visitor, bob: Visitor) -> None:
    before = log(hub)
    for action in ("approve", "promote", "rollback", "withdraw"):
        for message in ("", "  ", "x" * 1001):
            answer = send(bob, action, tag="prod", reference="v2", at=digest(hub, 1), message=message)
            assert answer.status in (400, 404), (action, message)
    assert log(hub) == before


def test_the_decider_of_the_api_decides(hub: Running, ada: Visitor) -> None:
    answer = send(ada, "promote", tag="prod", reference="v2", message="quick")
    assert answer.status == 400
    assert "approvals: 0 of 1" in answer.text
    assert send(ada, "approve", tag="prod", reference="v2", message="mine").status == 303
    answer = send(ada, "promote", tag="prod", reference="v2", message="quick")
    assert "not counted: ada (pushed, signed or moves it)" in answer.text
    assert send(ada, "promote", tag="latest", reference="v1", message="back").status == 400
    assert prod(hub) == 1


def test_a_page_that_is_out_of_date_moves_nothing(hub: Running, ada: Visitor, bob: Visitor) -> None:
    first, second = digest(hub, 1), digest(hub, 2)
    send(bob, "approve", tag="prod", reference="v2", message="read it")
    assert "moved in the meantime" in send(ada, "promote", tag="prod", reference="v2", at=second, message="go").text
    assert send(ada, "promote", tag="prod", reference="v2", at=first, message="go").status == 303
    assert send(ada, "rollback", tag="prod", at=second, message="wrong").status == 303
    answer = send(ada, "rollback", tag="prod", at=second, message="wrong")  # sent twice
    assert answer.status == 400
    assert "moved in the meantime" in answer.text
    assert prod(hub) == 1


def test_a_program_approves_nothing_by_a_form(hub: Running, visitor: Visitor, bob: Visitor, database: HubDatabase) -> None:
    key = access_tokens.create(database, "bob", "write", kind=access_tokens.DEPLOY, namespaces=["team"])
    program = visitor.signed_in(key)
    answer = send(program, "approve", tag="prod", reference="v2", message="read it")
    assert (answer.status, "this is a token of a program" in answer.text) == (400, True)

"""The board of channels: what each tag means and why, what is missing for the next, and buttons for who may press them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from adapterhub.hub.accounts import access_tokens
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.web import channel_board
from adapterhub.hub.web.channel_board import BoardReader
from adapterhub.manifest.measurement import Evaluation
from adapterhub.manifest.release_statement import ReleaseStatement
from adapterhub.project import settings_file
from adapterhub.ref import Ref
from adapterhub.registry import measurement_log
from adapterhub.registry.releases import release_moves
from adapterhub.trust import bundle, keys, statement
from tests.hub.conftest import Running, serving
from tests.support.adapters import Make

from .conftest import Answer, Visitor, hide, person

RULES = """
[promote.prod]
from = "staging"
[promote.prod.require]
approvals = 1
from_others = true
eval = { golden = "cases>=1" }
[promote.eu]
from = "prod"
"""
BOARD = "/team/sql/channels"


@pytest.fixture
def hub(tmp_path: Path, make: Make) -> Iterator[Running]:
    """A hub with requirements on prod and eu; v1 is prod and nightly, v2 is staging, both by alice."""
    policy = settings_file.parse(RULES, tmp_path / "adapterhub.toml").policy
    with serving(tmp_path / "hub", policy=policy) as running:
        with running.registry() as registry:
            registry.author = "alice"
            for seed in (1, 2):
                registry.push(make(f"a{seed}", seed), Ref("team/sql", tag=f"1.0.{seed}"))
            for number, tag in ((1, "prod"), (1, "nightly"), (1, "staging"), (2, "staging")):
                registry.tag(Ref("team/sql", number=number), tag)
        yield running


@pytest.fixture
def database(hub: Running) -> Iterator[HubDatabase]:
    with closing(HubDatabase(hub.folder)) as tables:
        yield tables


def measure(hub: Running, number: int, **cases: float) -> None:
    metrics = {"pass_rate": sum(cases.values()) / len(cases), "cases": float(len(cases))}
    with hub.registry() as registry:
        evaluation = Evaluation("golden", metrics, ({"path": "t.jsonl", "digest": "sha256:1"},), {}, cases)
        measurement_log.record(registry, Ref("team/sql", number=number), evaluation)


def approve(hub: Running, account: str, number: int = 2) -> None:
    with hub.registry() as registry:
        registry.author = account
        text = ReleaseStatement("read it", "", account)
        release_moves.approve(registry.ledger, Ref("team/sql", number=number), "prod", text)


def buttons(page: Answer) -> list[str]:
    """What the forms about releases do, each once, in their order."""
    prefix = "/-/adapters/team/sql/"
    actions = [action.removeprefix(prefix) for action in page.html.values("form", "action") if action.startswith(prefix)]
    return list(dict.fromkeys(actions))


def test_readers_see_the_board_and_no_buttons(hub: Running, visitor: Visitor, database: HubDatabase) -> None:
    measure(hub, 2, one=1.0, two=0.0)
    for reader in (visitor, person(visitor, database, "rob", team="read")):
        page = reader.get(BOARD)
        assert page.status == 200
        assert buttons(page) == []
        assert [name for name in page.html.values("li", "id") if name.startswith("channel-")] == [
            f"channel-{tag}" for tag in ("latest", "staging", "prod", "eu", "nightly")
        ]
        assert "golden cases 2 pass_rate 0.5" in page.text
        assert "met from is or was staging needed: staging" in page.text
        assert "missing approvals 0 of 1 needed: 1 others" in page.text
        assert "eu no version yet" in page.text
        assert "2 other tags" in page.text
        assert "/team/sql/compare?from=v1&to=v2" in page.html.values("a", "href")
    assert BOARD in visitor.get("/team/sql").html.values("a", "href")
    hide(hub, "team/sql")
    assert visitor.get(BOARD).status == 404


def test_a_button_is_there_for_who_may_press_it_and_not_before_it_would_work(
    hub: Running, visitor: Visitor, database: HubDatabase
) -> None:
    alice, bob, carol = (
        visitor.signed_in(hub.token),
        *(person(visitor, database, name, team="write") for name in ("bob", "carol")),
    )
    assert "approve" in buttons(bob.get(BOARD))
    assert "approve" not in buttons(alice.get(BOARD))  # she pushed it, so that hers would not count
    assert "Promote v2 to prod" not in carol.get(BOARD).text
    measure(hub, 2, one=1.0)
    approve(hub, "bob")
    page = carol.get(BOARD)
    assert "Promote v2 to prod" in page.text
    assert "met approvals 1 of 1: bob" in page.text
    assert set(buttons(page)) == {"approve", "promote", "rollback", "withdraw"}
    assert "approve" not in buttons(bob.get(BOARD))
    assert "Promote v2 to prod" not in bob.get(BOARD).text  # who moves the tag does not count among those who approved
    key = access_tokens.create(database, "carol", "write", kind=access_tokens.DEPLOY, namespaces=["team"])
    program = Visitor(hub, headers={"Authorization": f"Bearer {key}"})
    assert "approve" not in buttons(program.get(BOARD))


def test_a_tag_says_since_when_by_whom_and_why_and_who_approved(hub: Running, visitor: Visitor) -> None:
    measure(hub, 2, one=1.0)
    approve(hub, "bob")
    with hub.registry() as registry:
        registry.author = "dave"
        registry.promote(Ref("team/sql", number=2), "prod", "as agreed <b>")
        day = registry.log(Ref("team/sql"))[0].time[:10]
    page = visitor.get(BOARD).text
    assert f"since {day} by dave: as agreed <b>" in page
    assert "Approved by bob" in page
    with hub.registry() as registry:
        release_moves.rollback(registry.ledger, Ref("team/sql", tag="prod"), "wrong dates")
        release_moves.withdraw(registry.ledger, Ref("team/sql", number=2), ReleaseStatement("leaked"))
    page = visitor.get(BOARD).text
    assert "rolled back: wrong dates" in page
    assert "Withdrawn. leaked" in page
    assert "Next: v2" not in page


def test_a_signed_version_is_withdrawn_by_the_buttons_of_an_admin_only(
    hub: Running, visitor: Visitor, database: HubDatabase, tmp_path: Path
) -> None:
    keys.generate(tmp_path / "key")
    with hub.registry() as registry:
        for number in (1, 2):
            manifest = registry.oci_manifest(registry.resolve(Ref("team/sql", number=number)))
            files = {layer.path: layer.digest for layer in manifest.layers}
            raw = bundle.sign(statement.Statement("team/sql", files), keys.read_private(tmp_path / "key.key"))
            registry.store.signatures.add(manifest.digest, raw)
    assert "withdraw" not in buttons(person(visitor, database, "bob", team="write").get(BOARD))
    assert "withdraw" in buttons(person(visitor, database, "ada", team="admin").get(BOARD))


def test_a_board_is_read_once_for_many_visitors(hub: Running, visitor: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network without a token may have 20 versions compared in five minutes."""
    reads = []
    read: Callable[..., object] = BoardReader.read
    monkeypatch.setattr(BoardReader, "read", lambda reader: (reads.append(1), read(reader))[1])
    assert {visitor.get(BOARD).status for _ in range(22)} == {200}
    assert len(reads) < 20  # once, and again in each minute that begins meanwhile


def test_requirements_that_lead_in_a_circle_end() -> None:
    assert channel_board.depth("a", {"a": "b", "b": "a"}) == 2
    assert channel_board.depth("prod", {"prod": "staging", "staging": "latest"}) == 2


def test_versions_are_compared_by_what_was_measured_of_both(hub: Running, visitor: Visitor) -> None:
    measure(hub, 1, one=1.0, two=0.0)
    measure(hub, 2, one=0.0, two=1.0)
    page = visitor.get("/team/sql/compare?from=v1&to=v2").text
    assert "golden pass_rate 0.5 0.5 +0" in page
    assert "p 1 by McNemar’s exact test of the 2 of 2 that flipped" in page
    assert "Better: two" in page
    assert "Worse: one" in page
    measure(hub, 2, three=1.0)
    assert "McNemar" not in visitor.get("/team/sql/compare?from=v1&to=v2").text

"""A repository that gets another name keeps what it had under the old one."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError

from adapterhub.hub import mirror_origin, renames
from adapterhub.hub.accounts import publishers
from adapterhub.hub.hub import Hub
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.settings import HubSettings
from adapterhub.index import queries
from adapterhub.maintenance import retention
from adapterhub.manifest.keep_rule import KeepRule
from adapterhub.manifest.measurement import Evaluation
from adapterhub.manifest.release_statement import ReleaseStatement
from adapterhub.ref import Ref
from adapterhub.registry import measurement_log, withdrawals
from adapterhub.registry.releases import release_moves
from adapterhub.registry.repository_documents import Repository
from adapterhub_converters.errors import RefusedError
from tests.hub.conftest import Running, serving
from tests.hub.sending import Sending
from tests.registry.forks import finished, fork

ISSUER = "https://gitlab.example"


def test_a_moved_repository_keeps_numbers_and_what_was_set_of_them(hub: Running, hf: Any, adapter: Callable[..., Path]) -> None:
    with hub.registry() as registry:
        for seed in range(4):
            registry.push(adapter(seed), Ref("team/sql"))
        registry.tag(Ref("team/sql", number=2), "prod")
        retention.keep(registry, Ref("team/sql"), KeepRule(2))
        retention.drop(registry, None, dry_run=False)
        registry.deprecate(Ref("team/sql", number=2), "Use v4.")
        registry.deprecate(Ref("team/sql"), "Use team/new.")
        measurement_log.record(registry, Ref("team/sql", number=3), Evaluation("eval", {"loss": 0.5}))
        before = queries.versions(registry.index, name="team/sql")
        assert [row.number for row in before] == [4, 3, 2]
        hf.move_repo("team/sql", "other/text2sql")
        registry.ledger.current("other/text2sql")
        after = queries.versions(registry.index, name="other/text2sql")
        assert [(row.number, row.tags, row.digest) for row in after] == [(row.number, row.tags, row.digest) for row in before]
        assert queries.marks(registry.index, "deprecate", "other/text2sql") == {"0": "Use team/new.", "2": "Use v4."}
        assert registry.show(Ref("other/text2sql", number=3))["evaluations"][0]["metrics"] == {"loss": 0.5}
        assert retention.chosen_rule(registry, Ref("other/text2sql")) == KeepRule(2)


def test_a_moved_repository_can_be_moved_back_and_the_other_name_leads_to_it(
    hub: Running, hf: Any, adapter: Callable[..., Path]
) -> None:
    with hub.registry() as registry:
        registry.push(adapter(1), Ref("team/sql"))
        registry.tag(Ref("team/sql"), "prod")
        hf.create_branch("team/sql", branch="next")
        hf.move_repo("team/sql", "team/new")
        registry.push(adapter(2), Ref("team/new"))
        registry.rm(Ref("team/new", tag="prod"))
        hf.move_repo("team/new", "team/sql")
        registry.ledger.current("team/sql")
        rows = queries.versions(registry.index, name="team/sql")
    assert [(row.number, row.tags) for row in rows] == [(2, ("latest",)), (1, ())]
    assert [branch.name for branch in hf.list_repo_refs("team/sql").branches] == ["main", "next"]
    assert hf.model_info("team/new").id == "team/sql"
    hf.delete_repo("team/sql")
    hf.create_repo("team/other")
    with pytest.raises(HfHubHTTPError, match="was removed"):
        hf.move_repo("team/other", "team/sql")


def test_words_branches_uploads_pins_and_publishers_follow(hub: Running, hf: Any, adapter: Callable[..., Path]) -> None:
    with closing(HubDatabase(hub.folder)) as database:
        publishers.add(database, "team/sql", ISSUER, {"sub": "ci"}, "ci")
        with hub.registry() as registry:
            digest = registry.push(adapter(1), Ref("team/sql")).digest
            registry.tag(Ref("team/sql"), "prod")
        mirror_origin.add(database, "team/sql", "a" * 40, digest)
        database.execute("INSERT INTO uploaded VALUES ('team/sql', ?, 1e12)", digest)
        hf.create_branch("team/sql", branch="next")
        hf.move_repo("team/sql", "team/new")
        assert [branch.name for branch in hf.list_repo_refs("team/new").branches] == ["main", "next"]
        assert [publisher.scope for publisher in publishers.list_publishers(database)] == ["team/new"]
        assert database.select("SELECT name, digest FROM uploaded") == [("team/new", digest)]
        assert hf.model_info("team/new", revision="a" * 40).sha == "a" * 40
        assert mirror_origin.names(database, "team") == {"team/sql"}  # the upstream has no team/new
        hf.move_repo("team/new", "other/sql")
        assert [publisher.scope for publisher in publishers.list_publishers(database)] == [
            "team/new"
        ]  # other is not its operator's


def test_what_was_withdrawn_stays_so_under_the_new_name_and_each_version_stays_by_who_pushed_it(
    hub: Running, hf: Any, adapter: Callable[..., Path]
) -> None:
    with hub.registry() as registry:
        registry.author = "bob"
        for seed in range(3):
            registry.push(adapter(seed), Ref("team/sql"))
        registry.tag(Ref("team/sql", number=2), "prod")
        for number in (1, 2):
            release_moves.withdraw(registry.ledger, Ref("team/sql", number=number), ReleaseStatement("a leaked key"))
        retention.drop(registry, None, dry_run=False, withdrawn=True)  # v1, which no tag means
        before = withdrawals.reasons(registry.index, "team/sql")
        hf.move_repo("team/sql", "team/new")
        registry.ledger.current("team/new")
        assert withdrawals.reasons(registry.index, "team/new") == before
        assert len(before) == 2
        for ref in (Ref("team/new", number=2), Ref("team/new", tag="prod")):
            with pytest.raises(RefusedError, match="v2 was withdrawn: a leaked key"):
                registry.resolve(ref)
        with pytest.raises(RefusedError, match="was withdrawn: a leaked key"):
            registry.push(adapter(0), Ref("team/new"))
        assert {entry.author for entry in registry.log(Ref("team/new")) if entry.op in ("push", "withdraw")} == {"bob"}
        assert registry.resolve(Ref("team/new")).number == 3


# ---- processes that are killed


@pytest.fixture
def settings(tmp_path: Path, adapter: Callable[..., Path]) -> HubSettings:
    """A hub in a folder, which has team/sql with two versions, the first one tagged, and a branch."""
    return filled(HubSettings(registry=tmp_path / "hub"), adapter)


WHOLE = [(2, ("latest",)), (1, ("prod",))]


def filled(settings: HubSettings, adapter: Callable[..., Path]) -> HubSettings:
    """The settings of a hub, which then has team/sql: two versions, the first one tagged and deprecated, and a publisher."""
    with closing(Hub(settings)) as hub:
        worker = hub.workers.worker()
        for seed in range(2):
            worker.registry.push(adapter(seed), Ref("team/sql"))
        worker.registry.tag(Ref("team/sql", number=1), "prod")
        worker.registry.deprecate(Ref("team/sql", number=1), "Use v2.")
        release_moves.withdraw(worker.registry.ledger, Ref("team/sql", number=1), ReleaseStatement("a leaked key"))
        worker.repositories.change("team/sql", lambda state: replace(state, created="2026-01-01T00:00:00Z"))
        publishers.add(hub.database, "team/sql", ISSUER, {"sub": "ci"}, "ci")
    return settings


def move_until(settings: HubSettings, old: str, new: str, steps: int) -> None:
    """Move a repository, and be killed before the write to a log or to a table that has this number."""
    hub = Hub(settings)
    worker, writes_left = hub.workers.worker(), steps

    def counted(write: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*words: Any, **options: Any) -> Any:
            nonlocal writes_left
            writes_left -= 1
            if not writes_left:
                os.kill(os.getpid(), signal.SIGKILL)
            return write(*words, **options)

        return counting

    worker.registry.store.log.append = counted(worker.registry.store.log.append)  # type: ignore[method-assign]
    worker.database.execute = counted(worker.database.execute)  # type: ignore[method-assign]
    renames.begin(worker, old, new)
    renames.finish(worker, old, new)
    hub.close()


def forked(*words: Any) -> int:
    """The exit code of a process that calls `move_until`."""
    return finished([fork(lambda: move_until(*words))])[0]


def visible_versions(hub: Hub, *names: str) -> list[tuple[str, list[tuple[int, tuple[str, ...]]]]]:
    """Those of some names under which everybody sees versions, with numbers and tags."""
    worker = hub.workers.worker()
    visible = [name for name in names if (view := hub.visible(worker, None, name)) and view.newest]
    return [(name, [(row.number, row.tags) for row in queries.versions(worker.registry.index, name=name)]) for name in visible]


def check_every_step(
    settings: HubSettings, run: Callable[..., int] = forked, stride: int = 2, *, is_back: bool = False
) -> None:
    """Kill processes that move a repository, each some steps later, until one is not killed: all of it is under one name.

    With `is_back`, it is moved to and fro between two names, otherwise to a name that is new each time.
    """
    name, steps, killed_before, killed_after = "team/sql", 0, 0, 0
    while True:
        new = ("team/new" if name == "team/sql" else "team/sql") if is_back else f"team/new-{steps}"
        old, steps = name, steps + stride
        code = run(settings, old, new, steps)
        with closing(Hub(settings)) as hub:
            ((name, versions),) = visible_versions(hub, old, new)
            assert versions == WHOLE
            killed_before, killed_after = killed_before + (name == old), killed_after + (name == new)
            asyncio.run(hub.finish_moves())
            ((name, versions),) = visible_versions(hub, old, new)
            assert versions == WHOLE
            worker = hub.workers.worker()
            assert renames.pending_moves(worker) == []
            assert worker.repositories.get(name) == Repository(created="2026-01-01T00:00:00Z")
            assert queries.marks(worker.registry.index, "deprecate", name) == {"1": "Use v2."}
            assert [*withdrawals.reasons(worker.registry.index, name).values()] == ["a leaked key"]
            assert [publisher.scope for publisher in publishers.list_publishers(hub.database)] == [name]
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert min(killed_before, killed_after) * stride > 5


def test_a_move_whose_process_is_killed_at_any_step_is_under_one_name_and_the_next_process_ends_it(
    settings: HubSettings,
) -> None:
    check_every_step(settings)


def test_a_move_back_whose_process_is_killed_at_any_step_is_under_one_name(settings: HubSettings) -> None:
    check_every_step(settings, stride=3, is_back=True)


def test_what_another_process_changes_just_before_the_old_name_redirects_moves_too(settings: HubSettings) -> None:
    with closing(Hub(settings)) as hub, closing(Hub(settings)) as other_hub:
        worker = hub.workers.worker()
        change, changes = worker.repositories.change, list[str]()

        def changed_meanwhile(name: str, edit: Callable[[Repository], Repository]) -> Repository:
            repository = change(name, edit)
            changes.append(name)
            if changes == ["team/new", "team/new"]:  # it begins, and has what the old name had
                other_hub.workers.worker().repositories.change("team/sql", lambda state: replace(state, private=True))
            return repository

        worker.repositories.change = changed_meanwhile  # type: ignore[method-assign, assignment]
        renames.begin(worker, "team/sql", "team/new")
        renames.finish(worker, "team/sql", "team/new")
        assert changes[-1] == "team/new"
        assert worker.repositories.get("team/new") == Repository(private=True, created="2026-01-01T00:00:00Z")
        assert visible_versions(hub, "team/sql", "team/new") == []


def ask_to_move(hub: Running, old: str, new: str) -> tuple[int, str]:
    """The status and the words of the answer to a client that asks for a move."""
    answer = Sending(hub.url, hub.token).ask("POST", "/api/repos/move", {"fromRepo": old, "toRepo": new})
    return answer.status, answer.data.decode()


def test_a_move_that_is_sent_again_after_its_process_was_killed_ends_and_so_does_one_that_was_done(
    settings: HubSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hub, "finish_moves", unmoved)
    assert forked(settings, "team/sql", "team/new", 5) == -signal.SIGKILL
    with serving(settings.registry) as hub:
        assert [ask_to_move(hub, "team/sql", "team/new")[0] for _ in range(2)] == [200, 200]
        with closing(Hub(settings)) as opened:
            assert visible_versions(opened, "team/sql", "team/new") == [("team/new", WHOLE)]
        status, words = ask_to_move(hub, "team/sql", "team/other")
        assert (status, "team/sql: was moved to team/new" in words) == (409, True)


def test_a_name_to_which_a_repository_is_being_moved_is_taken_and_nobody_sees_it(
    settings: HubSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hub, "finish_moves", unmoved)
    assert forked(settings, "team/sql", "team/new", 5) == -signal.SIGKILL
    with serving(settings.registry) as hub:
        client = Sending(hub.url, hub.token)
        push = client.ask("POST", "/v2/team/new/blobs/uploads/")
        assert (push.status, "is being moved here" in push.data.decode()) == (400, True)
        assert client.ask("POST", "/api/repos/create", {"name": "team/new"}).status == 409
        for path in ("/api/models/team/new", "/v2/team/new/tags/list", "/team/new", "/api/models/team/new.v1"):
            assert client.ask("GET", path).status == 404, path
        assert [model["id"] for model in client.ask("GET", "/api/models?author=team").json()] == ["team/sql"]
        assert client.ask("GET", "/v2/_catalog").json() == {"repositories": ["team/sql"]}


async def unmoved(_: Hub) -> None:
    """Leave moves that have begun to what the test asks for."""


def test_a_repository_that_is_removed_before_its_move_goes_on_is_at_neither_name(settings: HubSettings) -> None:
    assert forked(settings, "team/sql", "team/new", 5) == -signal.SIGKILL
    with closing(Hub(settings)) as hub:
        worker = hub.workers.worker()
        worker.registry.rm(Ref("team/sql"))
        worker.repositories.remove("team/sql")
        asyncio.run(hub.finish_moves())
        assert visible_versions(hub, "team/sql", "team/new") == []
        assert renames.pending_moves(worker) == []


def test_a_name_that_was_removed_is_refused_before_anything_moves(hub: Running, adapter: Callable[..., Path]) -> None:
    with hub.registry() as registry:
        for seed, name in enumerate(("team/sql", "team/gone")):
            registry.push(adapter(seed), Ref(name))
        registry.rm(Ref("team/gone"))
        status, words = ask_to_move(hub, "team/sql", "team/gone")
        assert (status, "this name was removed" in words) == (400, True)
        registry.ledger.current("team/gone")
        assert [row.name for row in registry.list()] == ["team/sql"]

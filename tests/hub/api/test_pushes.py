"""A push to a hub of ours makes what a push to a registry makes: versions, tags and a log, which every client sees."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import urllib3

from adapterhub.hub.api import changing, reading, routes
from adapterhub.hub.api.routes import rehearses
from adapterhub.hub.oci.manifest_handlers import rehearse_version
from adapterhub.ref import Ref
from tests.conftest import Run
from tests.hub.api.test_releasing import prod, releasing
from tests.hub.conftest import Running
from tests.support.adapters import Make


@pytest.fixture
def push(run: Run, hub: Running) -> Callable[..., Any]:
    """Run a command as a user of the hub, whose repository `hf://team/sql` is."""

    def call(*words: object, **options: Any) -> Any:
        return run(*words, env={"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token}, **options)

    return call


def ask(hub: Running, path: str) -> Any:
    return urllib3.request("GET", hub.url + path, headers={"authorization": f"Bearer {hub.token}"})


def test_tags_are_tags_for_pages_and_for_every_protocol(
    push: Callable[..., Any], hub: Running, adapter: Callable[..., Path]
) -> None:
    push("push", adapter(1), "hf://team/sql", "--tag", "beta", "--tag", "1.0.0")
    push("push", adapter(2), "hf://team/sql@next")
    push("tag", "hf://team/sql@v1", "prod")
    refs = ask(hub, "/api/models/team/sql/refs").json()
    assert [branch["name"] for branch in refs["branches"]] == ["main"]
    assert [tag["name"] for tag in refs["tags"]] == ["1.0.0", "beta", "next", "prod", "v1", "v2"]
    assert ask(hub, "/v2/team/sql/tags/list").json()["tags"] == ["1.0.0", "beta", "latest", "next", "prod", "v1", "v2"]
    assert b"prod" in ask(hub, "/team/sql/v1").data
    with hub.registry() as registry:
        rows = registry.list("team/sql")
    assert [row.tags for row in rows] == [("latest", "next"), ("1.0.0", "beta", "prod")]


def test_the_message_and_metrics_of_a_push_are_in_the_log_of_the_hub(
    push: Callable[..., Any], hub: Running, adapter: Callable[..., Path]
) -> None:
    push("push", adapter(1), "hf://team/sql", "-m", "twice the data", "--metric", "exact_match=0.71")
    with hub.registry() as registry:
        evaluated, pushed = registry.log(Ref("team/sql"))
        assert (pushed.op, pushed.message, pushed.author) == ("push", "twice the data", "alice")
        assert registry.show(Ref("team/sql"))["evaluations"][0]["metrics"] == {"exact_match": 0.71}
    assert evaluated.op == "evaluate"


def test_a_push_moves_a_tag_only_from_where_it_is_expected(
    push: Callable[..., Any], hub: Running, adapter: Callable[..., Path]
) -> None:
    first, second = adapter(1), adapter(2)
    push("push", first, "hf://team/sql@prod", "--expect", "absent")
    result = push("push", second, "hf://team/sql@prod", "--expect", "absent", code=7)
    assert "hf://team/sql@prod: moved in the meantime" in result.stderr
    with hub.registry() as registry:
        assert len(registry.list("team/sql")) == 1
        digest = registry.resolve(Ref("team/sql")).digest
    push("push", second, "hf://team/sql@prod", "--expect", digest)


def test_the_same_version_again_moves_tags_alone(push: Callable[..., Any], hub: Running, adapter: Callable[..., Path]) -> None:
    first, second = adapter(1), adapter(2)
    push("push", first, "hf://team/sql")
    push("push", second, "hf://team/sql")
    assert "already there" in push("push", first, "hf://team/sql").stdout
    again = json.loads(push("push", first, "hf://team/sql@old", "--json").stdout)
    assert (again["new"], again["moved"], again["number"], again["sent"]) == (False, True, 1, 0)
    with hub.registry() as registry:
        assert registry.resolve(Ref("team/sql")).number == 2


def test_a_private_push_is_private_from_its_first_byte(
    push: Callable[..., Any], hub: Running, adapter: Callable[..., Path]
) -> None:
    push("push", adapter(1), "hf://team/plans", "--private")
    assert urllib3.request("GET", f"{hub.url}/api/models/team/plans").status == 404
    assert ask(hub, "/api/models/team/plans").json()["private"] is True


def test_numbered_versions_are_copied_with_their_numbers_or_not_at_all(
    push: Callable[..., Any], hub: Running, adapter: Callable[..., Path]
) -> None:
    for seed in (1, 2):
        push("push", adapter(seed), "team/sql")
    push("copy", "team/sql:v1", "hf://team/sql@v1")
    assert "version numbers are given in turn" in push("copy", "team/sql:v2", "hf://team/sql@v7", code=7).stderr
    push("copy", "team/sql:v2", "hf://team/sql@v2")
    with hub.registry() as registry:
        assert [row.number for row in registry.list("team/sql")] == [2, 1]


def test_what_a_hub_refuses_is_refused_before_a_version_is_there(
    push: Callable[..., Any], hub: Running, adapter: Callable[..., Path], run: Run
) -> None:
    reader = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.make_token("bob", "read")}
    assert "needs the role write in team" in run("push", adapter(1), "hf://team/sql", env=reader, code=5).stderr
    for tag in ("HEAD", "latest"):
        assert f"hf://team/sql@{tag}: is " in push("push", adapter(1), "hf://team/sql", "--tag", tag, code=6).stderr
    with hub.registry() as registry:
        assert registry.list("team/sql") == []


# ---- tags that have requirements


def files_received(hub: Running) -> set[Path]:
    """The files that the hub has got from clients, whole or in part."""
    rooms = {"blobs", "packs", "uploads"}
    return {path for path in hub.folder.rglob("*") if path.is_file() and rooms.intersection(path.parts)}


def refused_at(hub: Running, run: Run, *words: object, code: int = 6) -> str:
    """What a command says last that the hub refuses."""
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token}
    return str(run(*words, env=env, code=code).stderr.splitlines()[-1])


def test_a_tag_that_is_refused_is_refused_before_a_byte_is_sent(tmp_path: Path, make: Make, run: Run) -> None:
    folder = make("new", 3)
    run("push", folder, "team/here")
    with releasing(tmp_path, make) as hub:
        before = files_received(hub)
        refusals = [
            refused_at(hub, run, *words)
            for words in (
                ("push", folder, "hf://team/sql@prod"),
                ("push", folder, "hf://team/sql@prod", "--dry-run"),
                ("push", folder, "hf://team/sql@next", "--tag", "prod"),
                ("copy", "team/here", "hf://team/sql@prod"),
            )
        ]
        assert len(set(refusals)) == 1
        assert "approvals: 0 of 1" in refusals[0]
        assert (files_received(hub), prod(hub)) == (before, 1)
        refusal = refused_at(hub, run, "push", tmp_path / "a2", "hf://team/sql@prod")
        assert "approvals: 0 of 1" in refusal  # a version that is there is not promoted by a push either
        assert (files_received(hub), prod(hub)) == (before, 1)


@pytest.mark.parametrize("hub_release", ["makes the change", "refuses the question"])
def test_an_earlier_hub_refuses_a_tag_in_the_same_words_once_it_has_the_bytes(
    hub_release: str, tmp_path: Path, make: Make, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, refusals = make("new", 3), []
    for release in ("this one", hub_release):
        if release == "makes the change":
            monkeypatch.setattr(reading, "DRY_RUN", "nothing")  # what it says of itself
        elif release == "refuses the question":
            monkeypatch.setattr(routes, "rehearses", lambda handler: rehearses(handler) and handler is not changing.publish)
        (tmp_path / release).mkdir()
        with releasing(tmp_path / release, make) as hub:
            before = files_received(hub)
            refusals.append(refused_at(hub, run, "push", folder, "hf://team/sql@prod"))
            assert (files_received(hub) == before) == (release == "this one")
            assert prod(hub) == 1
            assert "v3" in run("push", folder, "hf://team/sql@next", env={"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token}).stdout
    assert len(set(refusals)) == 1


def test_a_push_asks_before_it_sends_only_if_it_moves_a_tag(
    push: Callable[..., Any], adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    questions: list[Any] = []

    def counted(worker: Any, hub: Any, name: str, version: Any) -> Any:
        questions.append(version)
        return rehearse_version(worker, hub, name, version)

    monkeypatch.setattr(changing, "rehearse_version", counted)
    push("push", adapter(1), "hf://team/sql")
    push("push", adapter(2), "hf://team/sql@main")
    assert not questions
    push("push", adapter(3), "hf://team/sql@next")
    assert [version.tags for version in questions] == [("next",)]

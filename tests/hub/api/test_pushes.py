"""A push to a hub of ours makes what a push to a registry makes: versions, tags and a log, which every client sees."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import urllib3

from adapterhub.ref import Ref
from tests.conftest import Run
from tests.hub.conftest import Running


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

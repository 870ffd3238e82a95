"""A repository that gets another name keeps what it had under the old one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from adapterhub.hub import origins
from adapterhub.hub.database import HubDatabase
from adapterhub.hub.people import publishers
from adapterhub.index import queries
from adapterhub.maintenance import retention
from adapterhub.manifest.measurement import Evaluation
from adapterhub.ref import Ref
from adapterhub.registry import measurements
from tests.hub.conftest import Running

ISSUER = "https://gitlab.example"


def test_a_moved_repository_keeps_numbers_and_what_was_set_of_them(hub: Running, hf: Any, adapter: Callable[..., Path]) -> None:
    with hub.registry() as registry:
        for seed in range(4):
            registry.push(adapter(seed), Ref("team/sql"))
        registry.tag(Ref("team/sql", number=2), "prod")
        retention.keep(registry, Ref("team/sql"), 2)
        retention.drop(registry, None, dry_run=False)
        registry.deprecate(Ref("team/sql", number=2), "Use v4.")
        registry.deprecate(Ref("team/sql"), "Use team/new.")
        measurements.record(registry, Ref("team/sql", number=3), Evaluation("eval", {"loss": 0.5}))
        before = queries.versions(registry.index, name="team/sql")
        assert [row.number for row in before] == [4, 3, 2]
        hf.move_repo("team/sql", "other/text2sql")
        registry.ledger.current("other/text2sql")
        after = queries.versions(registry.index, name="other/text2sql")
        assert [(row.number, row.tags, row.digest) for row in after] == [(row.number, row.tags, row.digest) for row in before]
        assert queries.marks(registry.index, "deprecate", "other/text2sql") == {"0": "Use team/new.", "2": "Use v4."}
        assert registry.show(Ref("other/text2sql", number=3))["evaluations"][0]["metrics"] == {"loss": 0.5}
        assert retention.kept(registry, Ref("other/text2sql")) == 2


def test_words_branches_uploads_pins_and_publishers_follow(hub: Running, hf: Any, adapter: Callable[..., Path]) -> None:
    with closing(HubDatabase(hub.folder)) as database:
        publishers.add(database, "team/sql", ISSUER, {"sub": "ci"}, "ci")
        with hub.registry() as registry:
            digest = registry.push(adapter(1), Ref("team/sql")).digest
            registry.tag(Ref("team/sql"), "prod")
        origins.add(database, "team/sql", "a" * 40, digest)
        database.execute("INSERT INTO uploaded VALUES ('team/sql', ?, 1e12)", digest)
        hf.create_branch("team/sql", branch="next")
        hf.move_repo("team/sql", "team/new")
        assert [branch.name for branch in hf.list_repo_refs("team/new").branches] == ["main", "next"]
        assert [one.scope for one in publishers.listed(database)] == ["team/new"]
        assert database.select("SELECT name, digest FROM uploaded") == [("team/new", digest)]
        assert hf.model_info("team/new", revision="a" * 40).sha == "a" * 40
        assert origins.names(database, "team") == {"team/sql"}  # the upstream has no team/new
        hf.move_repo("team/new", "other/sql")
        assert [one.scope for one in publishers.listed(database)] == ["team/new"]  # other is not its operator's

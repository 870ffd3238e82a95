"""An index that says something else than the logs is reported by name."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from adapterhub.maintenance.fsck import fsck
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from tests.support.adapters import Make


def test_a_disagreement_is_reported_by_name_and_gone_after_a_rebuild(make: Make, tmp_path: Path) -> None:
    with Registry.init(tmp_path / "r") as registry:
        registry.push(make("a", 1), Ref.parse("team/sql:prod"))
        registry.push(make("b", 2), Ref.parse("team/sql"))
        with sqlite3.connect(tmp_path / "r/registry.db") as db:
            db.execute("UPDATE tags SET number = 2 WHERE tag = 'prod'")
        db.close()
        (finding,) = [finding for finding in fsck(registry) if finding.code == "catalog-wrong"]
        assert "the tags of team/sql do not match its log: prod, 2 instead of prod, 1" in finding.what
        assert registry.rebuild_index() == []
        assert fsck(registry) == []

"""Versions are dropped where that is requested, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub.maintenance import retention
from adapterhub.maintenance.fsck import fsck
from adapterhub.maintenance.gc import gc
from adapterhub.ref import Ref, RefError
from adapterhub.registry.registry import Registry
from adapterhub_converters.errors import NotFoundError
from tests.maintenance.test_gc import PROD, SQL
from tests.support.adapters import Make


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.init(tmp_path / "registry") as made:
        yield made


def test_versions_are_dropped_only_where_requested(registry: Registry, make: Make) -> None:
    for seed, tag in enumerate(["prod", "", "", ""], 1):
        registry.push(make(f"a{seed}", seed), Ref("team/sql", tag=tag or None))
        registry.push(make(f"a{seed}", seed), Ref("team/all", tag=tag or None))
    registry.deprecate(Ref.parse("team/sql:v2"), "old")
    assert gc(registry, grace=0).dropped == []
    retention.keep(registry, SQL, 2)
    assert retention.retention_limit(registry, SQL) == 2
    assert list(map(str, gc(registry, grace=0, dry_run=True).dropped)) == ["team/sql:v2"]
    assert list(map(str, gc(registry, grace=0).dropped)) == ["team/sql:v2"]
    assert [row.number for row in registry.list("team/sql")] == [4, 3, 1]
    assert len(registry.list("team/all")) == 4
    assert registry.deprecations() == {}
    with pytest.raises(NotFoundError, match="no such version"):
        registry.resolve(Ref.parse("team/sql:v2"))
    assert list(map(str, gc(registry, grace=0, last=1).dropped)) == [
        "team/all:v2",
        "team/all:v3",
    ]  # said of team/sql: 2
    retention.keep(registry, SQL, None)
    retention.keep(registry, Ref.parse("team/all"), 0)
    assert gc(registry, grace=0).dropped == []
    assert [entry.op for entry in registry.log(SQL)][:3] == ["keep-all", "drop", "keep"]
    assert registry.rebuild_index() == fsck(registry) == []
    assert registry.push(make("a2", 2), SQL).number == 5  # what was dropped may come again
    with pytest.raises(RefError, match="is set for a whole name"):
        retention.keep(registry, PROD, 1)


def test_a_dry_run_foretells_the_bytes_of_dropped_versions(registry: Registry, make: Make) -> None:
    for seed in (1, 2, 3):
        registry.push(make(f"a{seed}", seed), SQL)
    dry = gc(registry, grace=0, last=1, dry_run=True)
    assert len(registry.list()) == 3
    swept = gc(registry, grace=0, last=1)
    assert (dry.dropped, dry.blobs, dry.size) == (swept.dropped, swept.blobs, swept.size)
    assert swept.blobs == 8

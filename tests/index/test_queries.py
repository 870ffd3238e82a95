"""Pages of the tags and numbers of a name, in the order of their letters."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub.index import queries
from adapterhub.index.index_database import Index
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from tests.support.adapters import Make


def test_pages_of_tags_and_numbers_are_the_whole_list_in_order(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Registry.init(tmp_path / "registry") as registry:
        for number, tag in ((3, "v"), (12, "vx"), (100, "a")):
            manifest = registry.oci_manifest(registry.push(make(f"a{number}", number), Ref.parse(f"team/n{number}")))
            registry.push_manifest(manifest, Ref.parse("team/sql"), tags=("latest", tag), number=number)
        row_counts: list[int] = []
        select = Index.select

        def counted(index: Index, sql: str, *values: object, kinds: str = "") -> list[tuple[object, ...]]:
            rows = select(index, sql, *values, kinds=kinds)
            row_counts.append(len(rows))
            return rows

        monkeypatch.setattr(Index, "select", counted)
        names = sorted(["a", "latest", "v", "vx", "v3", "v12", "v100"])
        for limit in (1, 2, 3, 10):
            listed: list[str] = []
            while page := queries.tag_names(registry.index, "team/sql", listed[-1] if listed else "", limit):
                assert len(page) <= limit
                listed += page
            assert listed == names
        assert queries.tag_names(registry.index, "team/sql", "v10", 1) == ["v100"]
        row_counts.clear()
        queries.tag_names(registry.index, "team/sql", "", 1)
        assert max(row_counts) == 1

"""An index of an older program is brought up to date."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub.index.index_database import VERSION
from adapterhub.maintenance.fsck import fsck
from adapterhub.registry.registry import Registry
from tests.maintenance.test_repair import PROD, SQL
from tests.support.adapters import Make
from tests.support.aged import age


@pytest.fixture
def registry(make: Make, tmp_path: Path) -> Iterator[Registry]:
    with Registry.init(tmp_path / "registry") as opened:
        opened.push(make("a", 1), SQL)
        opened.push(make("b", 2), PROD)
        yield opened


@pytest.mark.parametrize("version", range(1, VERSION))
def test_an_older_database_is_brought_up_to_date(registry: Registry, version: int) -> None:
    registry.protect(PROD)
    rows = registry.list()
    registry.close()
    age(registry.root / "registry.db", version)
    with Registry.open(registry.root) as again:
        assert (again.list(), again.show(PROD)["protected"], fsck(again)) == (rows, ["prod"], [])

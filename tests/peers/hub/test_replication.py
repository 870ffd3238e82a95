"""Two processes of a hub over PostgreSQL and a bucket replicate what is pushed to either of them, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adapterhub.hub import replication
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from tests.hub.conftest import serving
from tests.hub.test_replication import to_hub, wait_until
from tests.support.adapters import Make

pytestmark = pytest.mark.peer


def test_what_is_pushed_to_either_process_is_at_the_target_once(
    tmp_path: Path, places: dict[str, Any], make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replication, "_INTERVAL", 0.2)
    with serving(tmp_path / "target") as target:
        options = {**places, "replications": (to_hub(target),)}
        with serving(tmp_path / "one", **options) as first, serving(tmp_path / "two", **options) as second:
            for number in range(6):
                with (first, second)[number % 2].registry() as registry:
                    registry.push(make(f"a{number}", number), Ref.parse(f"team/sql:t{number}"))
            with first.registry() as source, target.registry() as copies:

                def listed(registry: Registry) -> list[Any]:
                    registry.refresh()
                    return [(row.number, row.digest, row.tags) for row in registry.list("team/sql")]

                wait_until(lambda: listed(copies) == listed(source))
                assert sum(entry.op == "push" for entry in copies.log(Ref.parse("team/sql"))) == 6

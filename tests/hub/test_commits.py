"""What a hub looks up by names and revisions of others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub.ref import Ref
from tests.hub.conftest import Running
from tests.hub.oci.conftest import Registry


@pytest.mark.parametrize("name", ["..%2F..%2Fetc/passwd", "../x", "team/..", "team%2Fsql/x", "team/sql%01", "con/x"])
def test_a_name_that_cannot_be_here_is_that_of_nothing(hub: Running, name: str, adapter: Callable[..., Path], hf: Any) -> None:
    with hub.registry() as opened:
        opened.push(adapter(1), Ref("team/sql"))
    registry = Registry(hub.url, hub.token)
    for path in (
        f"/api/models/{name}",
        f"/{name}/resolve/main/README.md",
        f"/v2/{name}/tags/list",
        f"/v2/{name}.gguf/tags/list",
    ):
        assert registry.ask("GET", path).status == 404

"""A mirror of several processes: what one has fetched, the others serve, and together they make one version of a commit."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from adapterhub.hub.settings import Upstream
from adapterhub.registry.repository_documents import commit_id
from tests.hub.conftest import serving
from tests.hub.sending import Sending
from tests.hub.test_mirror import NAME, push_upstream, sha, versions, weights
from tests.support.hub_server import Hub

pytestmark = pytest.mark.peer


def test_processes_that_mirror_the_same_hub_make_one_version(
    tmp_path: Path, places: dict[str, Any], adapter: Callable[..., Path]
) -> None:
    with Hub() as upstream, ExitStack() as stack:
        commit = push_upstream(upstream, adapter(1))
        mirrored = Upstream(f"hub+{upstream.url}/", upstream.url)
        hubs = [stack.enter_context(serving(tmp_path / f"hub-{number}", mirror=mirrored, **places)) for number in range(2)]
        with ThreadPoolExecutor(8) as pool:
            bodies = list(pool.map(lambda number: weights(Sending(hubs[number % 2].url)), range(8)))
        assert set(bodies) == {(adapter(1) / "adapter_model.safetensors").read_bytes()}
        (version,) = versions(hubs[0])
        assert [sha(Sending(hub.url)) for hub in hubs] == [commit_id(version.digest)] * 2
        del upstream.repos[NAME]
        assert [sha(Sending(hub.url), commit) for hub in hubs] == [commit] * 2

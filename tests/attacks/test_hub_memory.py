"""What a hub remembers of strangers' requests is bounded in bytes, whatever they choose as keys.

The caches are found in the memory of a hub that runs, so that a new one is held to the same.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from starlette.routing import Route

from adapterhub.hub import app, middleware
from adapterhub.hub.hub import Hub
from adapterhub.hub.lru_cache import LRUCache, memory_of
from adapterhub.hub.web.site import Site
from adapterhub.hub.workers import Worker
from adapterhub.ref import Ref
from tests.attacks.test_hub_bodies import ROUTES
from tests.hub.conftest import Running, serving
from tests.support.adapters import write_adapter
from tests.support.hub_tenants import Tenant

LONG = 2000  # characters of what a stranger chooses
GROWTH = 300_000  # bytes of one container, for what is bounded by a number and has small keys
FOLDERS: dict[type, Callable[[Any], Path | None]] = {
    Hub: lambda hub: hub.settings and hub.settings.registry,
    Site: lambda site: site.hub.settings and site.hub.settings.registry,
    Worker: lambda worker: worker.registry.root,
}
PARAMETERS = {"namespace": "red", "repo": "open", "name": "red/open", "revision": "main"}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Running]:
    with serving(tmp_path / "hub") as running:
        red = Tenant(running, "red")
        red.create("open")
        assert red.commit("open", {"README.md": b"# Open"}).ok
        yield running


def containers(root: object) -> Iterator[tuple[str, object]]:
    """The caches and dictionaries that an object of the hub leads to, with their paths."""
    visited, pending = set(), [("", root)]
    while pending:
        path, value = pending.pop()
        if id(value) in visited:
            continue
        visited.add(id(value))
        if isinstance(value, LRUCache | dict | set):
            yield path, value
        elif isinstance(value, list | tuple):
            pending += [(f"{path}[]", item) for item in value]
        elif type(value).__module__.startswith("adapterhub."):
            names = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
            names += list(getattr(value, "__dict__", ()))
            pending += [(f"{path}.{name}", getattr(value, name)) for name in names]


def caches_of(running: Running) -> dict[str, object]:
    """All containers of the hub that serves a folder."""
    # `type`: a weak proxy's object may be gone.
    roots = [item for item in gc.get_objects() if issubclass(type(item), tuple(FOLDERS))]
    mine = [root for root in roots if folder_of(root) == running.folder]
    workers = (root for root in mine if isinstance(root, Worker))
    numbers = {id(worker): number for number, worker in enumerate(workers)}  # one of each thread
    return {
        f"{type(root).__name__}{numbers.get(id(root), '')}{path}": value for root in mine for path, value in containers(root)
    }


def folder_of(root: Any) -> Path | None:
    return next(folder(root) for kind, folder in FOLDERS.items() if isinstance(root, kind))


def flood(running: Running, number: int) -> None:
    """Ask every route that reads for something that nobody asked for before."""
    noise = f"{number:04}" + "x" * LONG
    for route in ROUTES:
        if isinstance(route, Route) and "GET" in (route.methods or ()):
            for values in (PARAMETERS, {}):
                path = route.path.replace(":path", "")
                for name in route.param_convertors:
                    path = path.replace(f"{{{name}}}", values.get(name, noise[:200]))
                query = {"cursor": noise, "search": noise, "q": noise, "p": noise, "limit": noise, "filter": noise}
                requests.get(f"{running.url}{path}", params=query, timeout=20, allow_redirects=False)


def test_there_are_caches(hub: Running) -> None:
    caches = caches_of(hub)
    assert sum(isinstance(value, LRUCache) for value in caches.values()) >= 8, list(caches)


def test_the_page_of_promises_has_the_sums_of_these_limits(hub: Running) -> None:
    page = (Path(__file__).parents[2] / "docs/security.md").read_text()
    caches = {id(value): value.max_size for value in caches_of(hub).values() if isinstance(value, LRUCache)}
    limits = app.BODY_LIMITS
    assert f"| memory for what is remembered | {sum(caches.values()) >> 20} MiB of all clients |" in page
    assert f"| {limits.stranger >> 20} MiB of an address, {limits.account >> 20} MiB of all together |" in page
    assert f"{middleware.STRANGER_ROWS} a minute of an address, {middleware.ALL_STRANGER_ROWS} of all" in page


def test_what_strangers_ask_for_takes_bounded_memory(hub: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 requests with cursors of 50 kB took 98 MB for ever: what counted was their answers of two bytes."""
    flood(hub, 0)
    before = {path: memory_of(value) for path, value in caches_of(hub).items() if not isinstance(value, LRUCache)}
    limits = {path: value for path, value in caches_of(hub).items() if isinstance(value, LRUCache)}
    for cache in limits.values():
        cache.max_size = 50_000
    for number in range(1, 4):
        flood(hub, number)
    for path, cache in limits.items():
        assert cache.total <= 50_000, path
        assert memory_of(cache._values) <= 2 * 50_000, path
    for path, value in caches_of(hub).items():
        if not isinstance(value, LRUCache):
            assert memory_of(value) < before.get(path, 0) + GROWTH, path


def test_the_spellings_of_a_revision_take_bounded_memory(hub: Running, tmp_path: Path) -> None:
    """Each of the many ways to write a version had a copy of its list of files, in each of eight threads."""
    red = Tenant(hub, "red")
    assert red.upload("open", write_adapter(tmp_path / "adapter", 1)).ok
    caches = [value for path, value in caches_of(hub).items() if path.endswith("caches.commits")]
    assert caches
    for cache in caches:
        assert isinstance(cache, LRUCache)
        cache.max_size = 20_000
    with hub.registry() as registry:
        digest = registry.row(Ref("red/open")).digest
    prefixes = ("", "refs%2Fheads%2F", "refs%2Ftags%2F")
    spellings = [f"{prefix}{digest[:end]}" for prefix in prefixes for end in range(15, len(digest) + 1)]
    for spelling in spellings:
        assert red.get(f"/api/models/red/open/revision/{spelling}").ok
    after = {path: value for path, value in caches_of(hub).items() if "commits" in path or "views" in path}
    assert all(memory_of(value._values if isinstance(value, LRUCache) else value) < 100_000 for value in after.values())


def test_the_key_of_an_entry_counts() -> None:
    cache: LRUCache[bytes] = LRUCache(100_000, len)
    for number in range(100):
        cache.get(("tree", f"{number:05}" * 1000), lambda: b"[]")
    assert cache.total <= 100_000
    assert len(cache._values) < 20


@pytest.mark.parametrize("value", ["x" * 5000, b"x" * 5000, {"a": ["x" * 5000]}, (("x" * 5000,),), ValueError("x" * 5000)])
def test_memory_is_that_of_all_that_a_value_has(value: Any) -> None:
    assert 5000 < memory_of(value) < 7000
    assert memory_of([value, value]) < 7000 + sys.getsizeof([0, 0])


def test_answers_are_among_them(hub: Running) -> None:
    red = Tenant(hub, "red")
    assert red.get("/api/models/red/open").ok
    cache_names = {path.rpartition(".")[2] for path in caches_of(hub)}
    assert {"answers", "commits", "configs", "manifests", "repositories", "rows", "_states"} <= cache_names

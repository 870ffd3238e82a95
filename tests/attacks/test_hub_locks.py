"""Who may not change a name makes nobody wait: they are refused before any lock, turn or transaction is taken.

The routes are those of the application, so that a new one is held to the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
import requests
from starlette.routing import Route

from adapterhub.hub.accounts import accounts
from adapterhub.hub.change_locks import ChangeLocks
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.jobs import Jobs
from adapterhub.ref import Ref
from adapterhub.registry.ledger import Ledger
from tests.attacks.test_hub_bodies import ROUTES
from tests.attacks.test_hub_forms import Visitor
from tests.hub.conftest import Running, serving
from tests.hub.sending import lines_of
from tests.support.adapters import write_adapter
from tests.support.hub_tenants import Tenant

PARAMETERS = {
    "namespace": "red", "repo": "open", "name": "red/open", "oid": "0" * 64, "hash": "0" * 64, "session": "0" * 32,
    "revision": "main", "branch": "next", "tag": "prod", "reference": "v1", "number": "1", "ident": "1",
    "digest": f"sha256:{'0' * 64}",
}  # fmt: skip
FORM = {
    "to": "red/new", "reference": "v1", "tag": "prod", "message": "so", "reason": "so", "comment": "so", "status": "closed",
    "commit": "", "confirm": "red/open", "proposal": "1", "visibility": "private", "account": "carol", "mode": "auto",
    "keep": "1", "title": "so", "at": "", "version": "1",
}  # fmt: skip
DOCUMENT = {
    **FORM, "name": "open", "organization": "red", "fromRepo": "red/open", "toRepo": "red/new", "type": "model",
}  # fmt: skip
LOCKS: list[tuple[type, str]] = [
    (ChangeLocks, "change"), (ChangeLocks, "move"), (Jobs, "claim"), (Ledger, "write_lock"), (HubDatabase, "rehearsal"),
]  # fmt: skip
# What every account may do with a name that it sees, or is no change.
OF_READERS = {
    "/xet/{epoch}/{namespace}/{repo}/v1/telemetry", "/api/models/{namespace}/{repo}/paths-info/{revision}",
    "/api/models/{namespace}/{repo}/like", "/{namespace}/{repo}.git/info/lfs/objects/batch",
    "/-/adapters/{namespace}/{repo}/star",
}  # fmt: skip


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A hub with a name, a proposal of carol, and an account that may read both."""
    folder = tmp_path_factory.mktemp("locks")
    with serving(folder / "hub") as running:
        red, carol = Tenant(running, "red"), Tenant(running, "carol")
        red.create("open")
        assert red.upload("open", write_adapter(folder / "adapter", 1)).ok
        with running.registry() as registry:
            registry.tag(Ref("red/open", number=1), "prod")
        with closing(HubDatabase(running.folder)) as database:
            accounts.add(database, "blue")
        carol.token = running.make_token("carol", "read")
        proposed = carol.post("/api/models/red/open/commit/main?create_pr=1", data=lines_of({"NOTES.md": b"more"}))
        assert proposed.ok, proposed.text
        yield running


@pytest.fixture(scope="module")
def outsider(hub: Running) -> Tenant:
    """An account without a role in the namespace."""
    tenant = Tenant(hub, "blue", "write")
    tenant.token = hub.make_token("blue", "write", namespaces=("elsewhere",))
    return tenant


def changes() -> list[Any]:
    """The methods and paths of the routes that may change something of a name."""
    cases = []
    for route in ROUTES:
        path = route.path if isinstance(route, Route) else ""
        is_about_name = bool({"repo", "name"} & {*(route.param_convertors if isinstance(route, Route) else ())})
        if not isinstance(route, Route) or not (is_about_name or path.startswith("/api/repos")):
            continue
        for name in route.param_convertors:
            value = PARAMETERS.get(name, "x")
            path = path.replace(f"{{{name}:path}}", value).replace(f"{{{name}}}", value)
        methods = sorted({*(route.methods or ())} - {"GET", "HEAD"})
        cases += [pytest.param(method, path, route.path, id=f"{method} {route.path}") for method in methods]
    return cases


def test_there_are_changes() -> None:
    assert len(changes()) > 60


@pytest.mark.parametrize(("method", "path", "route"), changes())
def test_who_may_not_change_a_name_takes_no_lock(
    hub: Running, outsider: Tenant, method: str, path: str, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rehearsal that a stranger asked for waited for the write lock of all, in a thread that no reader had meanwhile."""
    locks: list[str] = []

    def recording(cls: type, name: str) -> Callable[..., Any]:
        lock = getattr(cls, name)

        def record(*values: Any, **options: Any) -> Any:
            locks.append(f"{cls.__name__}.{name} {values[1:]}")
            return lock(*values, **options)

        return record

    for cls, name in LOCKS:
        monkeypatch.setattr(cls, name, recording(cls, name))
    visitor, statuses = Visitor.sign_in(hub, outsider.token), []
    for query in ("", "?dry_run=true"):
        if path.startswith("/-/"):
            statuses.append(visitor.post(f"{path}{query}", {**FORM, "csrf": visitor.csrf}))
            continue
        for token in ("", outsider.token):
            headers = {"content-type": "application/json", **({"authorization": f"Bearer {token}"} if token else {})}
            url, body = f"{hub.url}{path}{query}", json.dumps(DOCUMENT)
            statuses.append(requests.request(method, url, data=body, headers=headers, timeout=20).status_code)
    assert locks == [], statuses
    assert {*statuses[: len(statuses) // 2]} <= {401, 403, 404} or route in OF_READERS, statuses
    assert {*statuses} <= {400, 401, 403, 404} or route in OF_READERS, "400: for what cannot be rehearsed"

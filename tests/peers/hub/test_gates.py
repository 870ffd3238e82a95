"""A gate, a star and a read are the same for all processes of a hub over PostgreSQL and a bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from adapterhub.hub import gates, popularity, read_log
from adapterhub.hub.accounts import accounts
from adapterhub.hub.storage.from_settings import open_database
from adapterhub.ref import Ref
from adapterhub_converters.errors import ConflictError
from tests.hub.conftest import Running, serving
from tests.support.hub_tenants import Tenant

pytestmark = pytest.mark.peer
FILE, MODEL = "/team/sql/resolve/main/adapter_config.json", "/api/models/team/sql"


@pytest.fixture
def hubs(tmp_path: Path, places: dict[str, Any]) -> Iterator[tuple[Running, Running]]:
    """Two processes of a hub, as far as they share nothing but a database and a bucket."""
    with serving(tmp_path / "one", **places) as first, serving(tmp_path / "other", **places) as second:
        yield first, second


def test_what_one_process_is_told_the_other_knows_at_once(
    hubs: tuple[Running, Running], adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(popularity, "_TTL", 0.0)
    monkeypatch.setattr(popularity, "_PAUSE", 0)
    first, second = hubs
    with first.registry() as registry:
        registry.push(adapter(1), Ref("team/sql"))
        registry.push(adapter(2), Ref("team/other"))
    admin, ada = Tenant(first, "team", "admin"), Tenant(second, "ada")
    ada.token = second.make_token("ada", "read", kind="personal")
    assert ada.get(FILE).status_code in (200, 302)
    gate = {"mode": "manual", "terms": "Be good: 100 % \u2713"}
    admin.request("PUT", "/api/adapterhub/v1/names/team/sql/gate", json=gate).raise_for_status()
    refused = ada.get(FILE)
    assert (refused.status_code, refused.headers["x-error-code"]) == (403, "GatedRepo")
    assert [model["id"] for model in ada.get("/api/models?gated=true").json()] == ["team/sql"]
    assert ada.post(f"{MODEL}/ask-access").json() == {"status": "pending"}
    (request,) = admin.get(f"{MODEL}/user-access-request/pending").json()
    by = {"requestId": request["requestId"], "status": "accepted"}
    admin.post(f"{MODEL}/user-access-request/handle", json=by).raise_for_status()
    assert ada.get(FILE).status_code in (200, 302)
    with closing(open_database(first.settings)) as database:
        assert [(row.account, row.name) for row in read_log.reads(database, account="ada", name="team/sql")] != []
        with pytest.raises(ConflictError, match="accepted already"):
            gates.decide(database, "team/sql", "ada", gates.ACCEPTED, decider="team")
    ada.post(f"{MODEL}/like").raise_for_status()
    assert [model["likes"] for model in admin.get("/api/models?sort=likes").json()] == [1, 0]
    for order in ("downloads", "createdAt"):
        assert len(admin.get(f"/api/models?sort={order}&direction=1").json()) == 2
    admin.post("/api/repos/move", json={"fromRepo": "team/sql", "toRepo": "team/new"}).raise_for_status()
    assert admin.get("/api/models/team/new").json()["gated"] == "manual"
    assert ada.get(FILE.replace("/sql/", "/new/")).status_code in (200, 302)
    admin.post("/api/models/team/new/user-access-request/handle", json={"user": "ada", "status": "rejected"})
    assert ada.get(FILE.replace("/sql/", "/new/")).status_code == 403
    with closing(open_database(first.settings)) as database:
        accounts.remove(database, "ada")
        assert gates.gated_names(database) == ("team/new",)
        assert gates.find_request(database, "team/new", "ada") is None

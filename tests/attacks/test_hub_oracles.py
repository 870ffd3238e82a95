"""No route tells a name that exists and is hidden from one that does not: by status, headers, words or the lookups it takes.

The routes are those of the application, so that a new one is held to the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import urllib3
from starlette.routing import Route

from adapterhub.hub import gates, middleware, stars
from adapterhub.hub.accounts import accounts
from adapterhub.hub.gates import Gate
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.ref import Ref
from tests.attacks.test_hub_bodies import ROUTES
from tests.attacks.test_hub_forms import Visitor
from tests.attacks.test_hub_locks import DOCUMENT, FORM, PARAMETERS
from tests.hub.conftest import Running, serving
from tests.hub.sending import lines_of
from tests.hub.test_hidden import ABSENT, THERE, Statements, statements
from tests.hub.web.conftest import hide
from tests.support.adapters import write_adapter
from tests.support.hub_tenants import Tenant

__all__ = ["statements"]
# Of one request; and the etag of a page with the name.
CHANGING_HEADERS = ("x-request-id", "date", "etag")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A hub with a private name that has everything: a version, a tag, a gate, a star, and a proposal."""
    folder = tmp_path_factory.mktemp("oracles")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(middleware, "REFUSALS", 1_000_000)
        with serving(folder / "hub") as running:
            with running.registry() as registry:
                registry.push(write_adapter(folder / "adapter", 1), Ref(f"team/{THERE}", tag="prod"))
                registry.push(write_adapter(folder / "other", 2), Ref("team/open"))
            member = Tenant(running, "team")
            proposed = member.post(f"/api/models/team/{THERE}/commit/main?create_pr=1", data=lines_of({"NOTES.md": b"more"}))
            assert proposed.ok, proposed.text
            hide(running, f"team/{THERE}")
            with closing(HubDatabase(running.folder)) as database:
                for account in ("blue", "carol"):
                    accounts.add(database, account)
                gates.set_gate(database, f"team/{THERE}", Gate(gates.MANUAL, "Terms."))
                stars.give(database, f"team/{THERE}", "carol")
            yield running


def cases() -> list[Any]:
    """The methods and paths of the routes about a name, with `{}` for the name."""
    parameters = []
    for route in ROUTES:
        path = route.path if isinstance(route, Route) else ""
        if not isinstance(route, Route) or not {"repo", "name"} & {*route.param_convertors}:
            continue
        for name in route.param_convertors:
            value = {"namespace": "team", "repo": "{}", "name": "team/{}"}.get(name, PARAMETERS.get(name, "x"))
            path = path.replace(f"{{{name}:path}}", value).replace(f"{{{name}}}", value)
        parameters += [pytest.param(method, path, id=f"{method} {route.path}") for method in sorted(route.methods or ())]
    return parameters


def test_there_are_routes_about_names() -> None:
    assert len(cases()) > 100


@pytest.mark.parametrize(("method", "path"), cases())
@pytest.mark.parametrize("visitor_kind", ["", "blue"])
def test_a_hidden_name_is_answered_as_one_that_is_not_there(
    hub: Running, statements: Statements, visitor_kind: str, method: str, path: str
) -> None:
    token = hub.make_token("blue", "write", namespaces=("blue",)) if visitor_kind else ""
    visitor = Visitor.sign_in(hub, token) if visitor_kind and "/-/" in path and method == "POST" else None

    def ask(name: str) -> tuple[Any, ...]:
        if visitor:
            answer = visitor.session.post(
                hub.url + path.format(name), data={**FORM, "csrf": visitor.csrf}, timeout=20, allow_redirects=False
            )
            return normalized(answer.status_code, answer.headers, answer.text, name)
        headers = {"content-type": "application/json", **({"authorization": f"Bearer {token}"} if token else {})}
        body = None if method in ("GET", "HEAD") else json.dumps({**DOCUMENT, "paths": ["README.md"], "files": []})
        raw = urllib3.request(method, hub.url + path.format(name), headers=headers, body=body, redirect=False, retries=False)
        return normalized(raw.status, raw.headers, raw.data.decode("utf-8", "replace"), name)

    for name in (THERE, ABSENT):  # what is looked up once
        ask(name)
    for _ in range(4):  # what the hub remembers for some seconds may have been read again in one of the two
        existing, absent = (statements.about(lambda name=name: ask(name)) for name in (THERE, ABSENT))
        if existing == absent:
            break
    assert existing[0] == absent[0]
    assert existing[1] == absent[1]


def normalized(status: int, headers: Any, text: str, name: str) -> tuple[Any, ...]:
    """An answer without what names itself and the request."""
    stable_headers = {
        key.lower(): value.replace(name, "NAME") for key, value in headers.items() if key.lower() not in CHANGING_HEADERS
    }
    return status, stable_headers, text.replace(name, "NAME")

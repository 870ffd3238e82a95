"""A visitor without JavaScript, who notices what a page must not have."""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest

from adapterhub.hub.accounts import access_tokens, accounts
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.ref import Ref
from adapterhub.registry.repository_records import Repositories
from tests.hub.conftest import Running
from tests.support.adapters import write_adapter


class Html(HTMLParser):
    """What is in a page: its elements with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        """All text, in single spaces."""
        return " ".join(" ".join(self.texts).split())

    def values(self, tag: str, key: str) -> list[str]:
        """The values of an attribute of all elements of a kind."""
        return [attrs[key] or "" for name, attrs in self.elements if name == tag and key in attrs]


@dataclass(frozen=True)
class Answer:
    """An answer; `html` is the page in it, and several headers of a name are one list."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def html(self) -> Html:
        return Html(self.body.decode())

    @property
    def text(self) -> str:
        return self.html.text


@dataclass(frozen=True)
class Visitor:
    """A browser that follows no redirect."""

    hub: Running
    cookie: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    def get(self, path: str, **headers: str) -> Answer:
        """A page; whatever it is, it has the headers and lacks the elements that `checked` is about."""
        return checked(self._ask("GET", path, "", headers))

    def post(self, path: str, fields: dict[str, str], **headers: str) -> Answer:
        """Send a form."""
        kind = {"Content-Type": "application/x-www-form-urlencoded", "Origin": self.hub.url}
        return self._ask("POST", path, urlencode(fields), kind | headers)

    def _ask(self, method: str, path: str, body: str | bytes, headers: dict[str, str]) -> Answer:
        connection = http.client.HTTPConnection(urlsplit(self.hub.url).netloc, timeout=60)
        cookie = {"Cookie": self.cookie} if self.cookie else {}
        connection.request(method, path, body or None, {**self.headers, **cookie, **headers})
        answer = connection.getresponse()
        headers = {key.lower(): ", ".join(answer.headers.get_all(key, ())) for key in answer.headers}
        result = Answer(answer.status, headers, answer.read())
        connection.close()
        return result

    def signed_in(self, token: str) -> Visitor:
        """The visitor with a session."""
        answer = self.post("/-/sign-in", {"token": token})
        assert answer.status == 303
        return replace(self, cookie=answer.headers["set-cookie"].partition(";")[0])

    def csrf(self, path: str = "/") -> str:
        """The mark of the session in the forms of a page."""
        forms = [attrs for tag, attrs in self.get(path).html.elements if tag == "input" and attrs.get("name") == "csrf"]
        return str(forms[0]["value"])


def checked(answer: Answer) -> Answer:
    """Check what holds of every page: a strict policy, and nothing in it that the policy forbids or another host has."""
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    if not answer.headers.get("content-type", "").startswith("text/html"):
        return answer
    page = answer.html
    for tag, attrs in page.elements:
        assert tag not in ("script", "style", "iframe", "object", "embed", "base"), tag
        assert not [key for key in attrs if key == "style" or key.startswith("on")], attrs
        for key in ("src", "srcset", "action"):
            assert (attrs.get(key) or "/").startswith("/"), attrs
        assert tag != "link" or (attrs["href"] or "").startswith("/-/static/")
        assert not (attrs.get("href") or "").lower().startswith(("javascript:", "data:")), attrs
    assert len(page.values("html", "lang")) == 1
    assert len([tag for tag, _ in page.elements if tag == "h1"]) == 1
    assert len([tag for tag, _ in page.elements if tag == "main"]) == 1
    names = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(names) == len(set(names))
    return answer


@pytest.fixture
def visitor(hub: Running) -> Visitor:
    """Somebody whom the hub doesn't know."""
    return Visitor(hub)


@pytest.fixture
def push(hub: Running, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Push an adapter to the hub's registry: its name and its seed, files beside it, keys of its config; the digest."""
    with hub.registry() as registry:

        def call(
            name: str, seed: int = 0, *, files: dict[str, str] | None = None, tag: str | None = None, **config: Any
        ) -> str:
            folder = write_adapter(tmp_path / f"{name}-{seed}".replace("/", "-"), seed, **config)
            for path, text in (files or {}).items():
                (folder / path).write_text(text)
            return str(registry.push(folder, Ref(name, tag=tag)).digest)

        yield call


def hide(hub: Running, name: str) -> None:
    """Make a repository private."""
    with hub.registry() as registry:
        Repositories(registry).change(name, lambda state: replace(state, private=True))


@pytest.fixture
def database(hub: Running) -> Iterator[HubDatabase]:
    with closing(HubDatabase(hub.folder)) as tables:
        yield tables


def person(visitor: Visitor, database: HubDatabase, account: str, **roles: str) -> Visitor:
    """Somebody who is signed in, with roles in namespaces."""
    accounts.add(database, account)
    for namespace, role in roles.items():
        accounts.set_member(database, "*" if namespace == "everywhere" else namespace, account, role)
    return visitor.signed_in(access_tokens.create(database, account, "admin", kind=access_tokens.PERSONAL))

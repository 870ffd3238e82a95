"""What a hub answers to the API's client is checked: a wrong value is an error in one line, and nothing else."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from adapterhub.bases.hub_address import Hub
from adapterhub.index.version_search import Bound, Query, parse_bounds
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.ref import Ref
from adapterhub.remotes import content_documents, version_documents
from adapterhub.remotes.catalog import ContentQuery
from adapterhub.remotes.hub import hub_catalog
from adapterhub.remotes.hub.hub_catalog import HubCatalog
from adapterhub.remotes.hub.hub_client import HubAddress
from adapterhub_converters.errors import (
    AdapterhubError,
    ConflictError,
    FormatError,
    IntegrityError,
    NotFoundError,
    RefusedError,
    RemoteError,
    UsageError,
)
from tests.conftest import Run

DIGEST = "sha256:" + "a" * 64
MANIFEST = Manifest(DIGEST, b"{}", Descriptor("", DIGEST, 2), (), {})
ABOUT = {"program": "adapterhub", "version": "0.1.0", "api": [1]}
ROW = {
    "ref": "team/sql:v1", "name": "team/sql", "number": 1, "tags": ["latest"], "deprecated": None, "digest": DIGEST, "size": 1,
    "time": "2026-01-01T00:00:00Z", "base": None, "revision": None, "method": "lora", "r": 8, "least_r": 8, "alpha": 16.0,
    "format": "peft", "dtype": "F32", "parameters": 1, "license": None, "description": None, "parents": [],
}  # fmt: skip
USAGE = dict.fromkeys(("versions", "adapters", "files", "shared", "distinct", "saved", "stored"), 1)
NODE = {
    "digest": DIGEST, "refs": ["team/sql:v1"], "here": True, "deprecated": {}, "how": "trained", "rank": "8", "base": None,
    "data": [], "recipe": None,
}  # fmt: skip
ENTRY = {
    "seq": 1, "time": "2026-01-01T00:00:00Z", "op": "push", "number": 1, "numbers": [], "tags": ["latest"], "digest": DIGEST,
    "author": None, "message": None, "keep": None,
}  # fmt: skip
# Each answer, and what reads it.
ANSWERS: dict[str, tuple[dict[str, Any], Callable[[HubCatalog], object]]] = {
    "list": ({"adapters": [ROW], "deprecations": []}, lambda hub: hub.list("team")),
    "versions with": ({"adapters": [ROW], "deprecations": []}, lambda hub: hub.versions_with(DIGEST)),
    "search": (
        {"adapters": [ROW], "total": 1, "facets": {"base": {"x": 1}}, "has_more": False},
        lambda hub: hub.search(Query(), facets=True),
    ),
    "log": ({"name": "team/sql", "entries": [ENTRY]}, lambda hub: hub.log(Ref("team/sql"))),
    "lineage": (
        {
            "digest": DIGEST, "nodes": [NODE], "models": [],
            "edges": [{"parent": DIGEST, "child": DIGEST, "weight": 1.0, "method": None}],
        },
        lambda hub: hub.lineage(Ref("team/sql")),
    ),
    "find": (
        {
            "found": [
                {"source": "", "holders": [{"path": None, "tensor": None, "digest": DIGEST, "adapter": ROW}], "tensors": None}
            ],
            "unlisted": 0,
        },
        lambda hub: hub.find([ContentQuery("x", "a" * 64)]),
    ),
    "usage": (
        {
            "names": [{"name": "team/sql", **USAGE}],
            "bases": [{"repo": "x", "fingerprint": None, "whole_models": None, **USAGE}],
            "total": USAGE, "tensors": {"repeated": 0, "unlisted": 0},
            "models": [{"name": "x", "repo": "x", "fingerprint": None, "size": 1}],
        },
        lambda hub: hub.usage(),
    ),
    "show": (
        {
            "ref": "team/sql:v1", "name": "team/sql", "number": 1, "tags": [], "protected": [], "deprecated": None,
            "digest": DIGEST, "size": 1, "time": "", "evaluations": [{"name": "x", "metrics": {}}],
            "manifest": {}, "oci_manifest": {},
        },
        lambda hub: hub.show(Ref("team/sql")),
    ),
    "tag": (
        {**ROW, "new": False, "skipped": [], "moved": True},
        lambda hub: hub.tag(Ref("team/sql"), "prod", expect="absent"),
    ),
    "restore": ({"restored": "team/sql", "versions": [1], "lost": []}, lambda hub: hub.restore("team/sql")),
    "deprecate": ({"name": "team/sql", "number": 1, "deprecated": ""}, lambda hub: hub.deprecate(Ref("team/sql"))),
}  # fmt: skip


class _Server(ThreadingHTTPServer):
    """Answers each path with what `answers` has for it, by its end, else 404."""

    answers: dict[str, tuple[int, dict[str, str], bytes]]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        answers = self.server.answers
        status, headers, body = answers.get(self.path) or answers.get("*") or (404, {}, b"{}")
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = _answer

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def answering(document: Any = None, *, status: int = 200, about: Any = ABOUT, **headers: str) -> Iterator[HubAddress]:
    server = _Server(("127.0.0.1", 0), _Handler)
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    server.answers = {"*": (status, headers, body)}
    if about is not None:
        server.answers["/api/adapterhub"] = 200, {}, json.dumps(about).encode()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield HubAddress.parse(f"hub+http://127.0.0.1:{server.server_port}/team/sql")
    finally:
        server.shutdown()
        server.server_close()


def connect(address: HubAddress) -> HubCatalog:
    catalog = hub_catalog.connect(address, Hub(address.endpoint, None))
    assert catalog is not None
    return catalog


@pytest.mark.parametrize("kind", ANSWERS)
def test_each_answer_is_read(kind: str) -> None:
    document, ask = ANSWERS[kind]
    with answering(document) as address, connect(address) as catalog:
        assert ask(catalog) is not None


def mutations(document: Any) -> Iterator[Any]:
    """The documents that differ from one by a value of another type, at any depth."""
    if isinstance(document, dict):
        for key, value in document.items():
            yield {other: document[other] for other in document if other != key}
            yield from ({**document, key: changed} for changed in mutations(value))
    elif isinstance(document, list):
        yield from ([changed] for changed in mutations(document[0])) if document else ()
        yield {}
    for wrong in ([None], {"x": 1}, True, 1.5, -1, "\x1b[2J", "../..", None, 2**70):
        if type(wrong) is not type(document) or wrong in (-1, 2**70, "\x1b[2J"):
            yield wrong


@pytest.mark.parametrize("kind", ANSWERS)
def test_no_wrong_value_gets_past_the_reader(kind: str) -> None:
    """It is an error with a line of its own, or the value is one of those that may be anything."""
    document = ANSWERS[kind][0]
    readers: dict[str, Callable[[Any], object]] = {
        "list": lambda value: version_documents.read_listing(value, "hub"),
        "versions with": lambda value: version_documents.read_listing(value, "hub"),
        "search": lambda value: version_documents.read_search(value, "hub"),
        "log": lambda value: version_documents.read_log(value, "hub"),
        "lineage": lambda value: content_documents.read_lineage(value, "hub"),
        "find": lambda value: content_documents.read_content_answer(value, "hub", "x"),
        "usage": lambda value: content_documents.read_usage(value, "hub"),
        "show": lambda value: version_documents.read_shown(value, "hub"),
        "tag": lambda value: version_documents.read_version(value, "hub"),
        "restore": lambda value: version_documents.read_restore(value, "hub"),
        "deprecate": lambda value: version_documents.read_number(value, "hub"),
    }
    refused = 0
    for changed in mutations(document):
        with suppress(FormatError):
            readers[kind](changed)
            continue
        refused += 1
    assert refused


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("not-found", NotFoundError),
        ("conflict", ConflictError),
        ("refused", RefusedError),
        ("integrity", IntegrityError),
        ("usage", UsageError),
        ("bug", RemoteError),
        (["x"], RemoteError),
    ],
)
def test_an_error_of_the_hub_is_one_of_ours_about_an_address(kind: Any, error: type[AdapterhubError]) -> None:
    document = {
        "kind": kind, "where": "team/sql:v9", "what": "no such\nversion\x1b[2J", "hint": "x" * 5000, "code": "no-such-tag",
        "fields": {"repository": "team/sql", "n": 1},
    }  # fmt: skip
    with answering(document, status=400) as address, connect(address) as catalog:
        with pytest.raises(error) as caught:
            catalog.show(Ref("team/sql", number=9))
        if error is not RemoteError:
            assert caught.value.where == f"{catalog.location}/team/sql@v9"
            assert caught.value.fields == {"repository": f"{catalog.location}/team/sql", "registry": catalog.location}
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 1000


def test_an_unknown_code_or_one_without_its_fields_still_prints_a_line(run: Run) -> None:
    for code in ("no-such-tag", "made-up", "internal-error"):
        document = {"kind": "not-found", "where": "team/sql", "what": "gone", "code": code, "fields": {}}
        with answering(document, status=404) as address:
            lines = run("log", address.repository, code=3).stderr.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: hub+http://")


def test_a_hub_does_not_fill_in_the_host_of_a_login_that_a_hint_shows(run: Run) -> None:
    error = {"kind": "refused", "what": "no", "code": "login-required", "fields": {"host": "evil.example"}}
    with answering(error, status=403) as address:
        assert "evil.example" not in run("log", address.repository, code=6).stderr


def test_a_list_that_does_not_end_is_cut() -> None:
    empty, link = {"adapters": [], "deprecations": []}, '</api/adapterhub/v1/versions>; rel="next"'
    with answering(empty, link=link) as address, connect(address) as catalog, pytest.raises(RemoteError, match="more than"):
        catalog.list()


@pytest.mark.parametrize(
    "change",
    [
        lambda hub: hub.tag(Ref("team/sql"), "prod", expect=DIGEST),
        lambda hub: hub.rm(Ref("team/sql", tag="prod"), expect=DIGEST),
        lambda hub: hub.publish("team/sql", MANIFEST, tags=["prod"], expect=DIGEST, message="", metrics={}),
        lambda hub: hub.restore("team/sql"),
    ],
    ids=("tag", "rm", "publish", "restore"),
)
def test_a_change_that_would_not_be_made_twice_is_not_sent_again(change: Callable[[HubCatalog], object]) -> None:
    with answering({}, status=503) as address, connect(address) as hub, pytest.raises(RemoteError, match="may have been made"):
        change(hub)


def test_another_hub_an_older_hub_and_one_with_another_api_are_told_apart(run: Run) -> None:
    with answering({}, status=404, about=None) as address:
        assert "[local-only]" in run("lineage", address.repository, code=2).stderr
        assert "[local-only]" in run("deprecate", address.repository, code=2).stderr
        run("remote", "add", "other", address.login, "--default")
        for words in (["search", "sql"], ["du"], ["search", "--sha256", "a" * 64]):
            assert f"{address.login}: has no " in (line := run(*words, "--remote", code=2).stderr)
            assert "[hub-only]" in line
    for about in (None, {"program": "adapterhub", "api": [2]}, {"program": "adapterhub", "api": "1"}):
        with answering({"info": {"title": "adapterhub"}}, about=about) as address:
            done = run("log", address.repository, code=5)
            assert "runs an adapterhub without the API that this command needs" in done.stderr
            assert "[older-hub]" in done.stderr


def test_the_conditions_of_a_search_are_sent_as_they_were_parsed() -> None:
    for text in ("8", "4..16", "<16", ">=0.5", "1e-9..1e20"):
        bounds = parse_bounds(text, "")
        assert parse_bounds(hub_catalog._bounds_text(bounds), "") == bounds
    assert parse_bounds(hub_catalog._bounds_text((Bound("<", 10e6),)), "", size=True) == parse_bounds("<10MB", "", size=True)

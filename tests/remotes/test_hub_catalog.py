"""What a hub answers to the API's client is checked: a wrong value is an error in one line, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from adapterhub.index.version_search import Bound, Query, parse_bounds
from adapterhub.ref import Ref
from adapterhub.remotes import content_documents, version_documents
from adapterhub.remotes.catalog import ContentQuery
from adapterhub.remotes.hub import hub_catalog
from adapterhub.remotes.hub.hub_catalog import HubCatalog
from adapterhub_converters.errors import (
    FormatError,
    RemoteError,
)
from tests.support.hub_answers import answering, connect

DIGEST = "sha256:" + "a" * 64
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


@pytest.mark.parametrize("kind", ANSWERS)
def test_each_answer_is_read(kind: str) -> None:
    document, ask = ANSWERS[kind]
    with answering(document) as address, connect(address) as catalog:
        assert ask(catalog) is not None


def mutations(document: Any) -> Iterator[Any]:
    """The documents that differ from one by a value of another type, at any depth."""
    if isinstance(document, dict):
        for key, value in document.items():
            yield {kept_key: document[kept_key] for kept_key in document if kept_key != key}
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


def test_a_list_that_does_not_end_is_cut() -> None:
    empty, link = {"adapters": [], "deprecations": []}, '</api/adapterhub/v1/versions>; rel="next"'
    with answering(empty, link=link) as address, connect(address) as catalog, pytest.raises(RemoteError, match="more than"):
        catalog.list()


def test_the_conditions_of_a_search_are_sent_as_they_were_parsed() -> None:
    for text in ("8", "4..16", "<16", ">=0.5", "1e-9..1e20"):
        bounds = parse_bounds(text, "")
        assert parse_bounds(hub_catalog._bounds_text(bounds), "") == bounds
    assert parse_bounds(hub_catalog._bounds_text((Bound("<", 10e6),)), "", size=True) == parse_bounds("<10MB", "", size=True)

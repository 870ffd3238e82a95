"""Requests with fields that an engine ignores are refused by the field's name."""

from __future__ import annotations

from typing import Any

import pytest

from adapterhub.serve.engines.ignored_fields import IGNORED, fields_ignored
from tests.serve.gateway.test_api_forms import REQUESTS
from tests.support.serving import Gateway

FIELDS = [(path, field) for path, fields in IGNORED["llama.cpp"].items() if "rerank" not in path for field in fields]


def body_with(field: str, value: Any) -> dict[str, Any]:
    first, _, suffix = field.partition(".")
    return {first: body_with(suffix, value) if suffix else value}


@pytest.mark.peer
@pytest.mark.parametrize(("path", "field"), FIELDS)
def test_fields_that_llama_server_ignores_are_refused_by_name(gateway: Gateway, path: str, field: str) -> None:
    reply = gateway.post(path, {**REQUESTS[path], "model": "team/a0", **body_with(field, {"type": "json_object"})})
    assert (reply.status, reply.document["error"]["code"], reply.document["error"]["param"]) == (400, "unsupported", field)
    assert reply.document["error"]["message"] == f"`{field}` is ignored by llama.cpp on {path}; leave it out"
    for neutral in (None, *IGNORED["llama.cpp"][path][field]):
        answered = gateway.post(path, {**REQUESTS[path], "model": "team/a0", **body_with(field, neutral)})
        assert answered.status == 200, answered.body


@pytest.mark.parametrize("engine", sorted(IGNORED))
def test_what_asks_for_nothing_is_not_refused(engine: str) -> None:
    for path, fields in IGNORED[engine].items():
        for field, values in fields.items():
            assert [*fields_ignored(engine, path, body_with(field, {"any": 1}))] == [field]
            assert not any([*fields_ignored(engine, path, body_with(field, value))] for value in (None, *values))
    assert not [*fields_ignored("torch", "/v1/completions", {"echo": True})]  # it refuses such fields itself

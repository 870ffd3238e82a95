"""Requests of any kind, made by chance from a seed: a hub answers each of them, and never with an error of its own.

ADAPTERHUB_SEED and ADAPTERHUB_REQUESTS choose others, and more.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from adapterhub.ref import Ref
from tests.hub.conftest import Running
from tests.hub.test_faults import assert_sound

_TEXTS = (
    "", "main", "team", "sql", "team/sql", "x" * 5000, "../../etc/passwd", "..%2F..%2Fetc%2Fpasswd", "%00", "é", "%ff%fe", "-1",
    "9" * 5000, "1e999", "nan", "%252F", "refs/heads/main", "sha256:" + "a" * 64, "a" * 64, "0" * 40, "con", ".", "^1", "~1",
    "' OR 1=1 --", '"*', "\\", "HEAD", "latest", "v1", "v99999999999999999999", "🏳" * 300, "a:b", "{}", "<script>", "true",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (None, True, 0, -1, 1 << 70, 1.5, "", [], {}, [[]], [None], {"x": {}}, *_TEXTS)
_FILE = {"key": "file", "value": {"path": "a.json", "content": "e30=", "encoding": "base64"}}
_LARGE = {"key": "lfsFile", "value": {"path": "a.json", "oid": "a" * 64, "size": 3}}
_BATCH = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": "a" * 64, "size": 3}]}
_SETTINGS = {"name": "sql", "organization": "team", "type": "model", "private": True, "visibility": "private", "gated": False}
_MODEL = "/api/models/{}/{}"
_API, _API_NAME = "/api/adapterhub/v1", "/api/adapterhub/v1/names/{}/{}"
# Method, path, and what is mutated for its body; a list becomes lines.
_REQUESTS: tuple[tuple[str, str, Any], ...] = (
    ("GET", "/api/models", None),
    ("GET", "/api/models/{}", None),
    ("GET", _MODEL, None),
    ("GET", f"{_MODEL}/revision/{{}}", None),
    ("GET", f"{_MODEL}/tree/{{}}", None),
    ("GET", f"{_MODEL}/tree/{{}}/{{}}", None),
    ("GET", f"{_MODEL}/refs", None),
    ("GET", f"{_MODEL}/commits/{{}}", None),
    ("GET", "/{}/{}/resolve/{}/{}", None),
    ("HEAD", "/{}/{}/resolve/{}/README.md", None),
    ("GET", "/lfs/{}/{}/{}", None),
    ("PUT", "/lfs/{}/{}/{}", _SETTINGS),
    ("POST", "/lfs/{}/{}/{}", _SETTINGS),
    ("POST", f"{_MODEL}/paths-info/{{}}", {"paths": ["README.md"], "expand": True}),
    ("POST", "/api/repos/create", _SETTINGS),
    ("POST", "/api/repos/move", {"fromRepo": "team/sql", "toRepo": "team/new"}),
    ("DELETE", "/api/repos/delete", _SETTINGS),
    ("POST", "/api/validate-yaml", {"content": "---\na: b\n---\n"}),
    ("POST", f"{_MODEL}/branch/{{}}", {"startingPoint": "main"}),
    ("DELETE", f"{_MODEL}/branch/{{}}", None),
    ("POST", f"{_MODEL}/tag/{{}}", {"tag": "x", "message": "y"}),
    ("DELETE", f"{_MODEL}/tag/{{}}", None),
    ("PUT", f"{_MODEL}/settings", _SETTINGS),
    ("GET", "/api/users/{}/overview", None),
    ("POST", f"{_MODEL}/preupload/{{}}", {"files": [{"path": "a.json", "size": 3, "sample": "e30="}]}),
    ("POST", f"{_MODEL}/commit/{{}}", [{"key": "header", "value": {"summary": "x"}}, _FILE, _LARGE]),
    ("POST", f"{_MODEL}/commit/main", [_FILE, {"key": "deletedFolder", "value": {"path": "x"}}]),
    ("POST", f"{_MODEL}/commit/main", [{"key": "header", "value": {"parentCommit": "0" * 40}}, _FILE]),
    ("POST", "/{}/{}.git/info/lfs/objects/batch", _BATCH),
    ("GET", f"{_MODEL}/xet-write-token/{{}}", None),
    ("POST", "/xet/{}/{}/{}/v1/xorbs/default/{}", _SETTINGS),
    ("POST", "/xet/{}/{}/{}/v1/shards", _SETTINGS),
    ("GET", "/{}", None),
    ("GET", "/api/whoami-v2", None),
    ("GET", "/api/models-tags-by-type", None),
    ("GET", "/api/{}", None),
    ("GET", f"{_API}/versions", None),
    ("GET", f"{_API}/search", None),
    ("GET", f"{_API}/usage", None),
    ("POST", f"{_API}/find", {"version": None, "files": ["sha256:" + "a" * 64], "tensors": [["sha256:" + "a" * 64, 3]]}),
    ("POST", f"{_API}/find", {"digest": "a" * 64}),
    ("GET", f"{_API_NAME}/log", None),
    ("GET", f"{_API_NAME}/versions/{{}}", None),
    ("GET", f"{_API_NAME}/versions/{{}}/lineage", None),
    ("GET", f"{_API_NAME}/tags/{{}}", None),
    ("POST", f"{_API_NAME}/versions", {"manifest": "{}", "tags": ["x"], "message": "y", "metrics": {"a": 1}}),
    ("PUT", f"{_API_NAME}/tags/{{}}", {"reference": "v1"}),
    ("POST", f"{_API_NAME}/tags/{{}}/restore", {"seq": 1}),
    ("PUT", f"{_API_NAME}/tags/{{}}/protection", None),
    ("PUT", f"{_API_NAME}/versions/{{}}/deprecation", {"message": "old"}),
    ("PUT", f"{_API_NAME}/deprecation", {"message": "old"}),
    ("DELETE", f"{_API_NAME}/deprecation", None),
    ("POST", f"{_API_NAME}/restore", None),
    ("DELETE", f"{_API_NAME}/tags/{{}}", None),
    ("GET", "/{}/{}", None),
)


def _mutated(rng: random.Random, value: Any) -> Any:
    """A document with one of its values replaced."""
    if rng.random() < 0.4 or not isinstance(value, dict | list) or not value:
        return rng.choice(_VALUES)
    if isinstance(value, list):
        return [_mutated(rng, value[0]), *value[1:]]
    key = rng.choice(list(value))
    return {**value, key: _mutated(rng, value[key])}


def _body(rng: random.Random, document: Any) -> bytes:
    if rng.random() < 0.1:
        return rng.choice((b"", b"\xff" * 40, b"[" * 50_000, b"{", b"null", struct.pack("<12I", *range(12))))
    lines = document if isinstance(document, list) else [document]
    changed = rng.randrange(len(lines) + 1)
    return b"\n".join(json.dumps(_mutated(rng, line) if n == changed else line).encode() for n, line in enumerate(lines))


def _raw_request(rng: random.Random, token: str) -> bytes:
    def text() -> str:
        chosen = rng.choice(_TEXTS)
        return chosen if "%" in chosen and chosen.isascii() else quote(chosen, safe=rng.choice(("", "/")))

    method, path, document = rng.choice(_REQUESTS)
    hostile = rng.randrange(2 * path.count("{}") + 1)  # at most one part
    for at, segment in enumerate(("team", "sql", "main", "README.md")[: path.count("{}")]):
        path = path.replace("{}", text() if at == hostile else segment, 1)
    if rng.random() < 0.4:
        keys = (
            "search",
            "author",
            "filter",
            "limit",
            "cursor",
            "expand",
            "recursive",
            "p",
            "size",
            "expires",
            "signature",
            "full",
            "words",
            "rank",
            "size",
            "metric",
            "prefix",
            "digest",
            "reference",
        )
        path += "?" + "&".join(f"{rng.choice(keys)}={text()}" for _ in range(rng.randrange(1, 4)))
    if rng.random() < 0.05:
        method = rng.choice(("PATCH", "OPTIONS", "BREW", "PUT", "HEAD"))
    body = b"" if document is None else _body(rng, document)
    headers = [f"host: {rng.choice(('x', 'x', 'x', '[::1', 'é'))}", f"content-length: {len(body)}", "connection: close"]
    bad = ("Bearer", "Bearer x", "Basic !!", "Basic eDp5", "é", "Bearer " + "x" * 9000)
    headers.append(f"authorization: {rng.choice((*bad, *[f'Bearer {token}'] * 40))}")
    headers.append(f"content-type: {rng.choice(('application/json', 'application/x-www-form-urlencoded', 'é', ''))}")
    if rng.random() < 0.3:
        ranges = ("bytes=5-1", "bytes=-0", "bytes=0-", "bytes=" + "9" * 18 + "-", "x", "bytes=0-1,3-4", "é")
        headers.append(f"range: {rng.choice(ranges)}")
    head = f"{method} {path} HTTP/1.1\r\n" + "\r\n".join(headers) + "\r\n\r\n"
    return head.encode() + body


def test_no_request_at_all_is_answered_with_an_error_of_ours(hub: Running, adapter: Callable[..., Path]) -> None:
    with hub.registry() as registry:
        registry.push(adapter(1), Ref("team/sql"))
    rng = random.Random(int(os.environ.get("ADAPTERHUB_SEED", "0")))
    host, port = hub.url.removeprefix("http://").split(":")
    for _ in range(int(os.environ.get("ADAPTERHUB_REQUESTS", "400"))):
        request = _raw_request(rng, hub.token)
        with socket.create_connection((host, int(port))) as sock:
            with contextlib.suppress(OSError):  # it may answer before it has read all
                sock.sendall(request)
            answer = sock.makefile("rb").readline()
        status = int(answer.split()[1])
        assert status < 500 or status == 501, (status, request[:2000])
    assert_sound(hub.folder)

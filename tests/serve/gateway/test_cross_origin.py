"""Pages of the sites that are named may use the API, and those of no other site."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from adapterhub.serve.gateway import cross_origin
from adapterhub_converters.errors import UsageError
from tests.conftest import Run
from tests.support import llama_server, serving
from tests.support.serving import Gateway, Models, Reply

SITE, KEY = "https://app.example", "ah-secret"
ASKED = {"model": "team/a0", "prompt": "hi ", "max_tokens": 1}


def preflight(gateway: Gateway, origin: str, path: str = "/v1/completions") -> Reply:
    headers: dict[str, Any] = {"access_control_request_method": "POST"}
    headers["access_control_request_headers"] = "authorization,x-stainless-os"
    return gateway.request("OPTIONS", path, origin=origin, **headers)


@pytest.mark.peer
def test_without_keys_only_pages_of_a_named_site_are_answered(models: Models, registry: Path, tmp_path: Path) -> None:
    options = ("--program", llama_server.program(), "--cors", SITE, "--cors", "http://localhost:3000")
    with serving.gateway(models.gguf, registry, tmp_path / "gateway", *options) as gateway:
        for origin in (SITE, "http://localhost:3000"):
            preflight_answer = preflight(gateway, origin)
            assert (preflight_answer.status, preflight_answer.headers["access-control-allow-origin"]) == (204, origin)
            assert preflight_answer.headers["access-control-allow-headers"] == "authorization,x-stainless-os"
            for stream in (False, True):
                reply = gateway.post("/v1/completions", {**ASKED, "stream": stream}, origin=origin)
                assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, origin)
                assert reply.headers["vary"] == "origin"
                assert {"x-request-id", "x-adapterhub-version"} <= {*reply.headers["access-control-expose-headers"].split(", ")}
            missing = gateway.post("/v1/completions", {**ASKED, "model": "team/none"}, origin=origin)
            assert (missing.status, missing.headers["access-control-allow-origin"]) == (404, origin)
        for origin in ("https://evil.example", "null", "http://app.example", f"{SITE}.evil.example"):
            assert "access-control-allow-origin" not in preflight(gateway, origin).headers
            refused = gateway.post("/v1/completions", ASKED, origin=origin)
            assert (refused.status, refused.document["error"]["code"]) == (403, "foreign_site")
            assert "access-control-allow-origin" not in refused.headers
        assert gateway.post("/v1/completions", ASKED, origin=SITE, host="evil.example").status == 403
        for path in ("/metrics", "/"):
            assert "access-control-allow-origin" not in gateway.get(path, origin=SITE).headers


@pytest.mark.peer
def test_any_page_with_a_key_may_be_answered(models: Models, registry: Path, tmp_path: Path) -> None:
    (tmp_path / "routes.toml").write_text(f'[keys.ada]\nsha256 = "{hashlib.sha256(KEY.encode()).hexdigest()}"\n')
    options = ("--program", llama_server.program(), "--route", tmp_path / "routes.toml", "--cors", "*")
    with serving.gateway(models.gguf, registry, tmp_path / "gateway", *options) as gateway:
        assert preflight(gateway, "https://any.example").status == 204
        for key, status in ((KEY, 200), ("wrong", 401)):
            reply = gateway.post("/v1/completions", ASKED, origin="https://any.example", authorization=f"Bearer {key}")
            assert (reply.status, reply.headers["access-control-allow-origin"]) == (status, "https://any.example")


@pytest.mark.peer
def test_any_page_without_a_key_is_refused_at_the_start(models: Models, registry: Path, run: Run) -> None:
    words = ("serve", models.gguf, "--registry", registry, "--program", llama_server.program(), "--port", 0, "--cors", "*")
    assert "[cors-needs-keys]" in run(*words, code=6).stderr


@pytest.mark.parametrize(
    "value", ["app.example", "https://app.example/", "https://app.example/page", "ftp://app.example", "https://", "null", "",
              "https://ada@app.example", "https://app.example:443", "https://app.example:port", "https://é.example"],
)  # fmt: skip
def test_what_no_browser_sends_as_an_origin_is_refused(value: str) -> None:
    with pytest.raises(UsageError, match="is not an origin. Write it like https://app.example"):
        cross_origin.parse_origins([value])


def test_origins_are_compared_as_browsers_write_them() -> None:
    origins = cross_origin.parse_origins(["HTTPS://App.example", "http://[::1]:3000"])
    assert origins == {SITE, "http://[::1]:3000"}
    assert cross_origin.is_allowed(SITE, origins)
    assert not cross_origin.is_allowed("", cross_origin.parse_origins(["*"]))

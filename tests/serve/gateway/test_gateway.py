"""The gateway as a process, in front of the real llama-server: names, refusals, moves of tags, streams, its end."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from adapterhub.operations.local_registry import Registry
from tests.conftest import Run
from tests.support import llama_server, serving
from tests.support.serving import Gateway, Models, Reply

pytestmark = pytest.mark.peer
P = "the quick brown fox "


def version(registry: Path, ref: str) -> str:
    with Registry(registry) as opened_registry:
        resolved_version = opened_registry.resolve(ref)
        return f"{resolved_version.name}@{resolved_version.digest}"


def error(reply: Reply) -> dict[str, Any]:
    """The error object of an answer, which is the same for all of them."""
    assert reply.headers["content-type"] == "application/json"
    document: dict[str, Any] = reply.document["error"]
    assert set(document) == {"message", "type", "param", "code"}
    return document


# ---- names


def test_a_version_by_each_of_its_names(gateway: Gateway, registry: Path, models: Models) -> None:
    exact = version(registry, "team/a1:prod")
    for name in ("team/a1", "team/a1:prod", "team/a1:v1", exact, exact[:30], "a1:prod"):
        reply = gateway.complete(name, P)
        assert (reply.status, reply.version, reply.document["model"]) == (200, exact, exact)
        assert reply.text == models.answer(P, 1)
    base = gateway.complete("base", P)
    assert (base.version, base.document["model"], base.text) == ("base", "base", models.answer(P))


@pytest.mark.parametrize(
    "name",
    ["team/none", "other/a0", "team/a0:none", "team/a0@sha256:0123", "gpt-5", "../etc", "team/a0,team/a1", "a" * 5000, "é"],
)
def test_an_unknown_name_is_an_error_and_never_the_base(gateway: Gateway, name: str) -> None:
    reply = gateway.complete(name, P)
    assert reply.status == 404
    assert error(reply)["code"] == "model_not_found"
    assert error(reply)["param"] == "model"
    assert len(reply.body) < 2000


def test_what_is_not_served_looks_as_if_it_were_not_there(gateway: Gateway, registry: Path, models: Models) -> None:
    with Registry(registry) as opened_registry:
        opened_registry.push(models.adapter(0), "secret/plan")
    hidden, missing = (gateway.complete(name, P) for name in ("secret/plan", "secret/none"))
    assert hidden.status == missing.status == 404
    assert hidden.body.replace(b"plan", b"none") == missing.body


def test_chat_and_streams_have_the_version_too(gateway: Gateway, registry: Path, models: Models) -> None:
    exact = version(registry, "team/a2")
    body = {"model": "team/a2", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 0}
    whole = gateway.post("/v1/chat/completions", body)
    assert (whole.status, whole.version, whole.document["model"]) == (200, exact, exact)
    streamed = gateway.post("/v1/chat/completions", {**body, "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.version == exact
    lines = [line[6:] for line in streamed.body.decode().split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert {chunk["model"] for chunk in chunks} == {exact}
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
    assert text == whole.document["choices"][0]["message"]["content"]


def test_several_prompts_in_one_request(gateway: Gateway, models: Models) -> None:
    prompts = [P, "pack my box "]
    whole = gateway.complete("team/a0", prompts)
    assert [choice["text"] for choice in whole.document["choices"]] == [models.answer(prompt, 0) for prompt in prompts]
    streamed = gateway.complete("team/a0", prompts, stream=True)
    *events, end = [line[6:] for line in streamed.body.decode().split("\n") if line.startswith("data:")]
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    texts = ["".join(choice["text"] for choice in choices if choice["index"] == index) for index in (0, 1)]
    assert (texts, end) == ([models.answer(prompt, 0) for prompt in prompts], "[DONE]")


def test_the_list_has_what_may_be_asked_for(gateway: Gateway, registry: Path) -> None:
    listed = {model["id"]: model for model in gateway.get("/v1/models").document["data"]}
    assert {"base", "team/a0", "team/a0:prod"} <= set(listed)
    assert not any(name.startswith("secret/") or name.endswith(":latest") for name in listed)
    assert listed["team/a3:prod"]["root"] == version(registry, "team/a3:prod")
    assert listed["team/a3:prod"]["parent"] == "base"
    model = gateway.get("/v1/models/team/a3:prod")
    assert model.document["root"] == model.version == version(registry, "team/a3:prod")
    assert gateway.get("/v1/models/team/none").status == 404


# ---- bodies


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "`model` is missing"),
        (b"{", 400, "not valid JSON"),
        (b"[]", 400, "not a JSON object"),
        (b'{"prompt":"x"}', 400, "`model` is missing"),
        (b'{"model":7}', 400, "`model` is missing"),
        (b'{"model":"base","model":"team/a0"}', 400, "duplicate"),
        (b'{"model":"team/a0","lora":[{"id":0,"scale":1}]}', 400, "`lora`"),
        (b'{"model":"team/a0","cache_prompt":true}', 400, "`cache_prompt`"),
        (b'{"model":"team/a0*0.5+base/x","prompt":"x"}', 404, "does not exist"),
        (b'{"model":"hub/team/a0:prod","prompt":"x"}', 404, "'hub' is not the remote that is served here. Write team/a0:prod"),
        (b'{"model":"team/a0*0.5+team/a1","prompt":"x"}', 400, "not with a blend"),
        (b'{"model":"team/a0","prompt":{"no":"prompt"}}', 400, ""),
        (b"[" * 100_000, 400, "JSON"),
        (b"\xff\xfe", 400, "UTF-8"),
    ],
)
def test_a_body_that_cannot_be_answered(gateway: Gateway, body: bytes, status: int, words: str) -> None:
    reply = gateway.request("POST", "/v1/completions", body)
    assert reply.status == status
    assert words in error(reply)["message"]


def test_paths_and_methods_that_are_not_there(gateway: Gateway) -> None:
    assert error(gateway.get("/v1/nothing"))
    assert gateway.get("/v1/completions").status == 405
    reply = gateway.post("/v1/embeddings", {"model": "base", "input": "x"})
    assert (reply.status, error(reply)["code"]) == (404, "unsupported")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:1"}, 200),
        ({"host": "[::1]"}, 200),
        ({"host": "127.0.0.1:1", "origin": "http://127.0.0.1:1"}, 200),
        ({"host": "rebound.example:8000"}, 403),
        ({"host": "["}, 403),
        ({"host": ""}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "localhost:1", "origin": "http://localhost:2"}, 403),
    ],
)
def test_pages_of_other_sites_in_the_user_s_browser_are_not_answered(
    gateway: Gateway, headers: dict[str, str], status: int
) -> None:
    assert gateway.get("/v1/models", **headers).status == status
    assert gateway.get("/metrics", **headers).status == status
    assert gateway.complete("base", P, count=1, headers=headers).status == status


def test_large_bodies_are_refused_before_they_are_held(gateway: Gateway) -> None:
    gateway.complete("base", P)
    before = gateway.memory()
    address = (str(urlsplit(gateway.url).hostname), urlsplit(gateway.url).port or 80)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    for _ in range(5):
        with socket.create_connection(address) as client:
            client.sendall(head + b"Content-Length: 104857600\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 413 ")
        with socket.create_connection(address) as client:
            client.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
            with contextlib.suppress(OSError):  # it closes the connection before all has come
                for _ in range(100):
                    client.sendall(b"100000\r\n" + b" " * (1 << 20) + b"\r\n")
    assert gateway.memory() - before < 64 << 20


def test_thousands_of_unknown_names_leave_memory_flat(gateway: Gateway) -> None:
    parts = urlsplit(gateway.url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port)

    def ask(name: str) -> int:
        connection.request("POST", "/v1/completions", json.dumps({"model": name, "prompt": "x"}))
        answer = connection.getresponse()
        answer.read()
        return answer.status

    for number in range(500):
        assert ask(f"team/warm-{number}") == 404
    before = gateway.memory()
    for number in range(3_000):
        assert ask(f"team/unknown-{number}" if number % 2 else f"{number}-{'x' * 5000}") == 404
    connection.close()
    assert gateway.memory() - before < 4 << 20
    assert gateway.get("/metrics").body.count(b"unknown-") == 0


# ---- what the registry does meanwhile


def test_a_moved_tag_counts_from_the_next_request_on(gateway: Gateway, registry: Path, models: Models) -> None:
    with Registry(registry) as opened_registry:
        for number in (0, 1):
            opened_registry.push(models.adapter(number), "team/moving")
        opened_registry.tag("team/moving:v1", "live")
    versions = {version(registry, f"team/moving:v{number + 1}"): number for number in (0, 1)}
    replies: list[Reply] = []
    lock = threading.Lock()

    def ask() -> None:
        while True:
            with lock:
                if len(replies) >= 50:
                    return
            reply = gateway.complete("team/moving:live", P)
            with lock:
                replies.append(reply)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    while len(replies) < 20:
        time.sleep(0.005)
    with Registry(registry) as opened_registry:
        opened_registry.tag("team/moving:v2", "live")
    after = gateway.complete("team/moving:live", P)
    assert versions[after.version] == 1
    for thread in threads:
        thread.join()
    assert {reply.status for reply in replies} == {200}
    for reply in replies:
        assert reply.text == models.answer(P, versions[reply.version])
    assert {versions[reply.version] for reply in replies} == {0, 1}


def test_what_a_tag_moves_to_is_made_ready_before_it_is_asked_for(gateway: Gateway, registry: Path, models: Models) -> None:
    with Registry(registry) as opened_registry:
        opened_registry.push(models.adapter(2), "team/fetched:live")
        assert gateway.complete("team/fetched:live", P).status == 200
        opened_registry.push(models.adapter(3), "team/fetched:live")
    moved = version(registry, "team/fetched:live")
    while f"{moved} is ready" not in gateway.log.read_text():
        time.sleep(0.05)
    assert gateway.complete("team/fetched:live", P).version == moved


def test_a_registry_that_is_gone_for_a_while(models: Models, tmp_path: Path) -> None:
    serving.registry(tmp_path / "registry", models, 1).close()
    with running(models, tmp_path, "--poll", 0.1) as gateway:
        assert gateway.complete("team/a0", P).status == 200
        (tmp_path / "registry").rename(tmp_path / "away")
        lost = gateway.complete("team/a0", P)
        assert lost.status in (503, 200)
        if lost.status == 200:
            assert lost.text == models.answer(P, 0)
        else:
            assert error(lost)["code"] == "service_unavailable"
        assert gateway.complete("base", P).text == models.answer(P)
        (tmp_path / "away").rename(tmp_path / "registry")
        assert gateway.complete("team/a0", P).text == models.answer(P, 0)
        with Registry(tmp_path / "registry") as opened_registry:  # tags are looked at again
            opened_registry.push(models.adapter(1), "team/a0")
        while f"{version(tmp_path / 'registry', 'team/a0')} is ready" not in gateway.log.read_text():
            time.sleep(0.05)


def test_without_a_registry_the_base_is_served_and_clients_are_not_told_of_folders(models: Models, tmp_path: Path) -> None:
    with running(models, tmp_path) as gateway:
        assert "no registry there. Create one; until it is there, the base alone is served" in gateway.log.read_text()
        assert gateway.complete("base", P).text == models.answer(P)
        lost = gateway.complete("team/a0", P)
        assert (lost.status, error(lost)["code"]) == (503, "service_unavailable")
        assert str(tmp_path) not in lost.body.decode()
        serving.registry(tmp_path / "registry", models, 1).close()
        assert gateway.complete("team/a0", P).text == models.answer(P, 0)


def test_an_adapter_that_does_not_fit_is_refused_in_words(
    gateway: Gateway, registry: Path, models: Models, tmp_path: Path
) -> None:
    from tests.support import folders

    folders.adapter(tmp_path / "other", folders.pairs(9, size=(8, 8)))
    with Registry(registry) as opened_registry:
        opened_registry.push(tmp_path / "other", "team/misfit")
    reply = gateway.complete("team/misfit", P)
    assert reply.status == 400
    assert "llama.cpp" in error(reply)["message"]
    assert error(reply)["code"] not in (None, "refused")


def test_the_page_asks_the_api_and_loads_nothing_else(gateway: Gateway) -> None:
    page = gateway.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    text = page.body.decode()
    assert re.findall(r'(?:src|href)="([^"]*)"', text) == ["/page.css", "/page.js"]
    assert "<script>" not in text
    assert "style=" not in text
    for path in ("/page.css", "/page.js"):
        assert gateway.get(path).status == 200
    assert b"innerHTML" not in gateway.get("/page.js").body  # what adapters and models say is text


# ---- numbers and the end


def test_numbers_are_by_version(gateway: Gateway, registry: Path) -> None:
    gateway.complete("team/a0", P)
    gateway.complete("team/a0*0.123+team/a1", P)
    page = gateway.get("/metrics").body.decode()
    exact = version(registry, "team/a0")
    assert re.search(rf'adapterhub_requests_total{{path="/v1/completions",status="200",version="{exact}"}} \d', page)
    assert re.search(r'^vllm:lora_requests_info{max_lora="8",running_lora_adapters="",waiting_lora_adapters=""} \d', page, re.M)
    assert "*0.123" not in page  # a duration may have these digits


def test_running_adapters_are_named_as_they_are_asked_for(gateway: Gateway) -> None:
    with streaming(gateway, "team/a0:prod") as answer:
        answer.read(10)
        assert b'running_lora_adapters="team/a0:prod"' in gateway.get("/metrics").body


def test_a_client_that_goes_ends_its_request(gateway: Gateway) -> None:
    with streaming(gateway, "team/a0") as answer:
        answer.read(10)
        assert b"adapterhub_requests_running 1.0" in gateway.get("/metrics").body
    while b"adapterhub_requests_running 0.0" not in gateway.get("/metrics").body:
        time.sleep(0.02)


def test_requests_that_run_are_answered_when_it_ends(models: Models, registry: Path, tmp_path: Path) -> None:
    with running(models, tmp_path, registry=registry) as gateway, streaming(gateway, "team/a0", count=400) as answer:
        first = answer.read(10)
        gateway.process.send_signal(signal.SIGTERM)
        assert (first + answer.read()).rstrip().endswith(b"data: [DONE]")
        assert gateway.process.wait(60) == 143


def running(models: Models, folder: Path, *options: object, registry: Path | None = None) -> Any:
    registry_path = registry or folder / "registry"
    return serving.gateway(models.gguf, registry_path, folder / "gateway", "--program", llama_server.program(), *options)


@contextlib.contextmanager
def streaming(gateway: Gateway, model: str, count: int = 1500) -> Iterator[http.client.HTTPResponse]:
    """A long answer, of which the client has read nothing yet."""
    parts = urlsplit(gateway.url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port)
    body = {"model": model, "prompt": P, "max_tokens": count, "ignore_eos": True, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    try:
        answer = connection.getresponse()
        assert answer.status == 200
        yield answer
    finally:
        connection.close()


def test_a_public_address_needs_encryption_and_keys(run: Run, models: Models, registry: Path) -> None:
    words = (
        "serve",
        models.gguf,
        "--registry",
        registry,
        "--program",
        llama_server.program(),
        "--host",
        "0.0.0.0",
        "--port",
        0,
    )
    assert "tokens would cross the network in clear text" in run(*words, code=6).stderr
    error = (
        "error: 0.0.0.0: anyone on the network could use this server. Name a file with [keys] as --route  [gateway-needs-keys]"
    )
    assert error in run(*words, "--behind-proxy", code=6).stderr

"""llama-server answers wrongly in silence when it is asked as its documentation has it; through the gateway it does not."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.support import llama_server, serving
from tests.support.serving import Gateway, Models

pytestmark = pytest.mark.peer
# Long enough for a prefix to be worth reusing.
P = "the quick brown fox jumps over the lazy dog; " * 6
Q = "pack my box with five dozen liquor jugs, then " * 6
MATRIX = [(prompt, model) for prompt in (P, Q, P) for model in (None, 0, 1, 2)]


def name_of(number: int | None) -> str:
    return "base" if number is None else f"team/a{number}:prod"


@pytest.mark.parametrize("shape", [(), ("--one-process",)], ids=["router", "one process"])
def test_every_answer_is_of_the_version_that_was_asked_for(
    models: Models, registry: Path, tmp_path: Path, shape: tuple[str, ...]
) -> None:
    reused = 0
    options = ("--program", llama_server.program(), *shape)
    with serving.gateway(models.gguf, registry, tmp_path / "gateway", *options) as gateway:
        for _ in range(2):
            for prompt, number in MATRIX:
                reply = gateway.complete(name_of(number), prompt)
                assert reply.status == 200, reply.body
                assert reply.text == models.answer(prompt, number)
                assert reply.version == reply.document["model"]
                reused += reply.document["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert reused > 0


def test_alone_it_answers_with_other_adapters(models: Models, tmp_path: Path) -> None:
    """If this fails, llama.cpp is repaired (#26207, #28674), and `llama_one_process.explicit_request` can be simpler."""

    def ask(url: str, prompt: str, **fields: Any) -> str:
        body = {"prompt": prompt, "max_tokens": serving.COUNT, "temperature": 0, "logit_bias": serving.BIAS, **fields}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            text: str = json.load(answer)["choices"][0]["text"]
            return text

    with llama_server.alone(models.gguf, "--lora", ",".join(map(str, gguf_adapters(models, tmp_path))), "-np", 1) as url:
        alone = [{"id": 0, "scale": 1.0}, {"id": 1, "scale": 0.0}]
        assert ask(url, P, lora=alone) == models.answer(P, 0)
        assert ask(url, P) != models.answer(P)  # who names no adapter gets some
        assert ask(url, P, lora=[]) != models.answer(P)  # the same, though it asks for none
        nobody = [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 0.0}, {"id": 99, "scale": 1.0}]
        assert ask(url, Q, lora=nobody) == models.answer(Q)  # an adapter that is not there is the base


def gguf_adapters(models: Models, folder: Path) -> list[Path]:
    import adapterhub as ah

    for number in (0, 1):
        ah.convert(models.adapter(number), folder / f"a{number}.gguf", to="gguf", base=models.gguf)
    return [folder / "a0.gguf", folder / "a1.gguf"]


def test_more_versions_than_it_holds(models: Models, registry: Path, tmp_path: Path) -> None:
    options = ("--program", llama_server.program(), "--max-adapters", 2)
    with serving.gateway(models.gguf, registry, tmp_path / "gateway", *options) as gateway:
        for number in (0, 1, 2, 3, 0, 2):
            assert gateway.complete(name_of(number), P).text == models.answer(P, number)
        assert len(processes_of_versions(gateway)) == 2


def engines(gateway: Gateway) -> list[int]:
    return gateway.children()


def processes_of_versions(gateway: Gateway) -> list[int]:
    """Those that the router has started, in whichever of its threads, but that of the base."""
    [router] = gateway.children()
    children = {pid for path in Path(f"/proc/{router}/task").glob("*/children") for pid in path.read_text().split()}
    return [int(pid) for pid in children if b"adapter.gguf" in Path(f"/proc/{pid}/cmdline").read_bytes()]


KILLED = {"router": ((), engines), "one process": (("--one-process",), engines), "versions": ((), processes_of_versions)}


@pytest.mark.parametrize("kind", KILLED)
def test_what_is_killed_comes_back_and_no_answer_is_of_another_version(
    models: Models, registry: Path, tmp_path: Path, kind: str
) -> None:
    shape, victims = KILLED[kind]
    with serving.gateway(models.gguf, registry, tmp_path / "gateway", "--program", llama_server.program(), *shape) as gateway:
        replies: list[serving.Reply] = []
        stop = threading.Event()

        def ask(number: int) -> None:
            while not stop.is_set():
                replies.append(gateway.complete(name_of(number), P))

        def is_answered(number: int) -> bool:
            return any(reply.status == 200 and reply.version.startswith(f"team/a{number}@") for reply in [*replies])

        threads = [threading.Thread(target=ask, args=[number]) for number in (0, 1)]
        for thread in threads:
            thread.start()
        while not (is_answered(0) and is_answered(1)):
            time.sleep(0.01)
        killed = victims(gateway)
        assert killed
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        while any(map(is_running, killed)):
            time.sleep(0.01)
        # Only what is asked from here on is answered by what was started again: an answer in flight may be of before.
        for name in (name_of(0), name_of(1), "base"):
            while gateway.complete(name, P).status != 200:
                time.sleep(0.05)
        stop.set()
        for thread in threads:
            thread.join()
        for reply in replies:
            if reply.status == 200:
                assert reply.text == models.answer(P, int(reply.version[6]))
            else:
                assert reply.status in (502, 503)
                assert reply.document["error"]["message"]
        assert gateway.complete("team/a1", Q).text == models.answer(Q, 1)
        assert gateway.complete("base", Q).text == models.answer(Q)


@pytest.mark.parametrize("hangs", [False, True])
def test_it_ends_with_a_gateway_that_was_killed(models: Models, registry: Path, tmp_path: Path, hangs: bool) -> None:
    """With its child processes, and even if it hangs, as it sometimes does at SIGTERM."""
    options = ("--program", llama_server.program())
    with serving.gateway(models.gguf, registry, tmp_path / "gateway", *options) as gateway:
        [engine] = gateway.children()
        children = Path(f"/proc/{engine}/task").glob("*/children")
        processes = [engine, *(int(pid) for path in children for pid in path.read_text().split())]
        assert len(processes) == 2
        if hangs:
            os.kill(engine, signal.SIGSTOP)
        gateway.process.kill()
        while any(is_running(pid) for pid in processes):
            time.sleep(0.05)


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize("shape", [(), ("--one-process",)], ids=["router", "one process"])
def test_each_conversation_has_the_tokens_that_serve_says_at_its_start(
    models: Models, registry: Path, tmp_path: Path, shape: tuple[str, ...]
) -> None:
    """llama-server alone divides its context among the requests that it answers at once."""
    options = ("--program", llama_server.program(), "--context", 1280, *shape)
    with serving.gateway(models.gguf, registry, tmp_path / "gateway", *options) as gateway:
        assert (gateway.started["context"], gateway.started["precision"]) == (1280, "F32")
        for model in ("base", "team/a1"):
            replies = {
                count: gateway.post("/v1/completions", {"model": model, "prompt": [7] * count, "max_tokens": 4}).status
                for count in (1270, 1281)
            }
            assert replies == {1270: 200, 1281: 400}


def test_a_request_that_it_can_never_answer_is_the_clients_error(gateway: Gateway) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    for body in ({"messages": [{"role": "user", "content": [image]}]}, {"messages": [], "tools": "none"}):
        reply = gateway.post("/v1/chat/completions", {"model": "base", **body})
        assert (reply.status, reply.document["error"]["code"]) == (400, "unsupported")


def test_gateway_serves(gateway: Gateway) -> None:
    assert gateway.get("/ready").status == 200

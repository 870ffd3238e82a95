"""Two llama-servers behind a gateway: one is killed under load and started again, one has another base, one is removed."""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

import adapterhub as ah
from adapterhub.http_server.binding import free_port
from adapterhub.operations.workspace import Workspace
from tests.support import llama_server, serving
from tests.support.serving import BIAS, Gateway, Models
from tests.support.storm import PROMPTS

pytestmark = pytest.mark.peer
COUNT = 8
NAMES = {"base": None, **{f"team/a{number}:prod": number for number in range(4)}}


@dataclass
class Engines:
    """Servers of one base that are started, killed and started again at fixed ports, with four adapters each."""

    files: list[str]
    stack: ExitStack
    ports: list[int] = field(default_factory=lambda: [free_port(), free_port()])
    running: dict[int, ExitStack] = field(default_factory=dict)

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.ports]

    def options(self) -> list[str]:
        return [word for url in self.urls for word in ("--engine-url", url)]

    def start(self, number: int, base: Path, adapters: slice = slice(None)) -> None:
        self.running[number] = self.stack.enter_context(ExitStack())
        files = ",".join(self.files[adapters])
        server = llama_server.alone(base, "--lora", files, "--metrics", "-np", 4, "-t", 1, port=self.ports[number])
        self.running[number].enter_context(server)

    def kill(self, number: int) -> None:
        self.running.pop(number).close()


@pytest.fixture
def engines(models: Models, registry: Path, tmp_path: Path) -> Iterator[Engines]:
    workspace = Workspace(registry=registry, cache=tmp_path / "gateway" / "cache" / "adapterhub")
    served = [ah.resolve(f"team/a{n}:prod", runtime="llama.cpp", base=models.gguf, workspace=workspace) for n in range(4)]
    with ExitStack() as stack:
        yield Engines([str(version.path) for version in served], stack)


@contextmanager
def gateway(models: Models, registry: Path, tmp_path: Path, *options: object) -> Iterator[Gateway]:
    with serving.gateway(models.gguf, registry, tmp_path / "gateway", "--engine", "llama.cpp", *options) as running:
        yield running


def states(running: Gateway) -> dict[str, bool]:
    return {engine["name"]: engine["up"] for engine in running.get("/ready").document["engines"]}


def wait_for(running: Gateway, *expected: bool) -> None:
    while tuple(states(running).values()) != expected:
        time.sleep(0.05)


def test_each_answers_with_the_version_that_was_asked_for(
    models: Models, registry: Path, engines: Engines, tmp_path: Path
) -> None:
    for number in range(2):
        engines.start(number, models.gguf)
    with gateway(models, registry, tmp_path, *engines.options()) as running:
        for prompt in PROMPTS[:3]:
            for name, number in NAMES.items():
                assert running.complete(name, prompt, count=COUNT).text == models.answer(prompt, number, COUNT)
        names = [urlsplit(url).netloc for url in engines.urls]
        document = running.get("/ready").document
        assert document["engines"] == [{"name": name, "up": True, "running": 0} for name in names]
        metrics = running.get("/metrics").body.decode()
        for name in names:
            assert f'adapterhub_engine_up{{engine="{name}"}} 1.0' in metrics
        assert sum(requests(metrics, name) for name in names) == 3 * len(NAMES)
        assert all(requests(metrics, name) for name in names)


def requests(metrics: str, name: str) -> float:
    """The requests that an engine was asked."""
    [line] = [line for line in metrics.splitlines() if line.startswith(f'adapterhub_engine_requests_total{{engine="{name}"}}')]
    return float(line.split()[-1])


@dataclass
class Load:
    """Clients that ask one version after the other, whole or as a stream, until they are told to stop."""

    gateway: Gateway
    models: Models
    stopping: threading.Event = field(default_factory=threading.Event)
    verdicts: Counter[str] = field(default_factory=Counter)

    def ask_on(self, client: int) -> None:
        """Ask until told to stop."""
        number = client
        while not self.stopping.is_set():
            name, adapter = list(NAMES.items())[number % len(NAMES)]
            prompt = PROMPTS[number // len(NAMES) % len(PROMPTS)]
            self.verdicts[self._verdict(name, adapter, prompt, stream=number % 3 == 0)] += 1
            number += 1

    def _verdict(self, name: str, adapter: int | None, prompt: str, *, stream: bool) -> str:
        reply = self.gateway.complete(name, prompt, count=COUNT, stream=stream)
        if reply.status != 200:
            return f"{reply.status} {reply.body!r}"
        events = [line[6:] for line in reply.body.decode().splitlines() if line.startswith("data: ")] if stream else []
        if stream and events[-1] != "[DONE]":
            return "cut off" if '"engine_failed"' in events[-1] or '"service_unavailable"' in events[-1] else events[-1]
        text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1] if json.loads(event)["choices"])
        return "right" if (text if stream else reply.text) == self.models.answer(prompt, adapter, COUNT) else f"wrong: {name}"


def test_one_that_is_killed_under_load_loses_only_the_streams_it_had_and_joins_again(
    models: Models, registry: Path, engines: Engines, tmp_path: Path
) -> None:
    for number in range(2):
        engines.start(number, models.gguf)
    for prompt in PROMPTS:
        for number in NAMES.values():
            models.answer(prompt, number, COUNT)  # before many threads ask
    clients = 8
    with gateway(models, registry, tmp_path, *engines.options()) as running, ThreadPoolExecutor(clients) as pool:
        load = Load(running, models)
        asking = [pool.submit(load.ask_on, client) for client in range(clients)]
        try:
            for number in (0, 1, 0):
                answers = load.verdicts["right"]
                while load.verdicts["right"] < answers + 60:
                    time.sleep(0.02)
                engines.kill(number)
                wait_for(running, number != 0, number != 1)
                answers = load.verdicts["right"]
                while load.verdicts["right"] < answers + 30:
                    time.sleep(0.02)
                engines.start(number, models.gguf)
                wait_for(running, True, True)
        finally:
            load.stopping.set()
        for client in asking:
            client.result()
    assert set(load.verdicts) <= {"right", "cut off"}, load.verdicts
    assert load.verdicts["cut off"] <= 3 * clients


def test_a_stream_ends_with_its_engine_and_another_goes_on(
    models: Models, registry: Path, engines: Engines, tmp_path: Path
) -> None:
    for number in range(2):
        engines.start(number, models.gguf)
    with gateway(models, registry, tmp_path, *engines.options()) as running:
        streams = [Stream(running, "base") for _ in range(2)]
        assert [engine["running"] for engine in running.get("/ready").document["engines"]] == [1, 1]
        engines.kill(0)
        ends = [stream.read_rest() for stream in streams]
        assert ends[1].endswith("data: [DONE]\n\n")
        assert '"code": "service_unavailable"' in ends[0].splitlines()[-2]
        assert running.complete("base", PROMPTS[0], count=COUNT).text == models.answer(PROMPTS[0], None, COUNT)
        assert running.get("/ready").status == 200
        engines.kill(1)
        assert running.get("/ready").status == 503
        assert running.complete("base", PROMPTS[0]).status == 503


def test_a_version_is_answered_by_the_server_that_was_started_with_it(
    models: Models, registry: Path, engines: Engines, tmp_path: Path
) -> None:
    engines.start(0, models.gguf, slice(0, 2))
    engines.start(1, models.gguf, slice(1, 3))
    with gateway(models, registry, tmp_path, *engines.options()) as running:
        for prompt in PROMPTS:
            for number in range(3):
                reply = running.complete(f"team/a{number}:prod", prompt, count=COUNT)
                assert reply.text == models.answer(prompt, number, COUNT)
        reply = running.complete("team/a3:prod", PROMPTS[0])
        assert reply.status == 400
        assert "the llama-server was started without it" in reply.document["error"]["message"]
        assert tuple(states(running).values()) == (True, True)


class Stream:
    """A long answer of which the first line has been read."""

    def __init__(self, running: Gateway, model: str) -> None:
        parts = urlsplit(running.url)
        self._connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=120)
        body = {"model": model, "prompt": "x", "max_tokens": 900, "temperature": 0, "logit_bias": BIAS, "stream": True}
        self._connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        self._response = self._connection.getresponse()
        assert self._response.status == 200
        assert self._response.readline()

    def read_rest(self) -> str:
        """Read it to its end."""
        try:
            return self._response.read().decode()
        finally:
            self._connection.close()


def test_an_engine_with_another_base_is_never_asked_and_joins_with_the_right_one(
    models: Models, registry: Path, engines: Engines, tmp_path: Path
) -> None:
    other_models = serving.make_models(tmp_path / "other", adapters=0, hidden=32)
    with ExitStack() as stack:
        stack.enter_context(llama_server.alone(other_models.gguf, "--metrics", port=engines.ports[0]))
        engines.start(1, models.gguf)
        with gateway(models, registry, tmp_path, *engines.options()) as running:
            assert tuple(states(running).values()) == (False, True)
            for prompt in PROMPTS:
                for name, number in NAMES.items():
                    assert running.complete(name, prompt, count=COUNT).text == models.answer(prompt, number, COUNT)
            assert "is left out" in running.log.read_text()
            with urllib.request.urlopen(f"{engines.urls[0]}/metrics", timeout=60) as page:
                assert "llamacpp:prompt_tokens_total 0" in page.read().decode()
            stack.close()
            engines.start(0, models.gguf)
            wait_for(running, True, True)
            assert running.complete("base", PROMPTS[0], count=COUNT).text == models.answer(PROMPTS[0], None, COUNT)


def test_an_engine_with_other_weights_of_the_same_shapes_is_never_asked(
    models: Models, registry: Path, engines: Engines, tmp_path: Path
) -> None:
    raw = models.gguf.read_bytes()
    middle = len(raw) // 64 * 32
    (tmp_path / "other.gguf").write_bytes(raw[:middle] + np.frombuffer(raw[middle:], np.float32)[::-1].tobytes())
    engines.start(0, models.gguf)
    engines.start(1, tmp_path / "other.gguf")
    with gateway(models, registry, tmp_path, *engines.options()) as running:
        assert tuple(states(running).values()) == (True, False)
        assert "answers with other weights than the engine" in running.log.read_text()
        for prompt in PROMPTS:
            assert running.complete("base", prompt, count=COUNT).text == models.answer(prompt, None, COUNT)


def test_engines_of_the_route_file_come_and_go_while_requests_run(
    models: Models, registry: Path, engines: Engines, tmp_path: Path
) -> None:
    for number in range(2):
        engines.start(number, models.gguf)
    file = tmp_path / "routes.toml"
    tables = [f'[[engines]]\nurl = "{url}"\nname = "{name}"\n' for url, name in zip(engines.urls, "ab", strict=True)]
    file.write_text(tables[0])
    with gateway(models, registry, tmp_path, "--route", file) as running:
        stream = Stream(running, "base")
        file.write_text("".join(tables))
        running.reload()
        while states(running) != {"a": True, "b": True}:
            time.sleep(0.05)
        file.write_text(tables[1])
        running.reload()
        while states(running) != {"b": True}:
            time.sleep(0.05)
        for name, number in NAMES.items():
            assert running.complete(name, PROMPTS[0], count=COUNT).text == models.answer(PROMPTS[0], number, COUNT)
        metrics = running.get("/metrics").body.decode()
        assert (requests(metrics, "a"), requests(metrics, "b")) == (1, len(NAMES))
        assert stream.read_rest().endswith("data: [DONE]\n\n")
        file.write_text("")
        running.reload()
        while "the engines stay as they were: engines: all engines were removed" not in running.log.read_text():
            time.sleep(0.05)
        assert running.complete("base", PROMPTS[0], count=COUNT).text == models.answer(PROMPTS[0], None, COUNT)

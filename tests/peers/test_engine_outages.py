"""Somebody's own vLLM and llama-server hang, are killed, and come back with their adapters in another order, under load.

Every answer is compared with merged weights: none is of another version, and while an engine hangs the gateway says so.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import adapterhub as ah
from adapterhub.http_server.binding import free_port
from adapterhub.operations.workspace import Workspace
from tests.conftest import need_module
from tests.support import llama_server, serving, storm, vllm
from tests.support.serving import Gateway, Models

pytestmark = pytest.mark.peer
ADAPTERS, CLIENTS, COUNT = 3, 4, 8
WORDS_WHILE_DOWN = {502: "engine_failed", 503: "service_unavailable", 504: "timeout"}
Start = Callable[[Sequence[int]], AbstractContextManager[object]]
"""Starts an engine with adapters in this order, at the port of its kind."""


@pytest.fixture(params=["llama.cpp", "vLLM"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Models, Start, int]:
    """The kind of an engine, its models, how to start it, and its port."""
    for module in ("torch", "transformers", "peft"):
        need_module(module)
    port = free_port()
    if request.param == "vLLM":
        models = serving.make_models(tmp_path / "models", adapters=ADAPTERS, hidden=128, head=32)
        return "vllm", models, lambda order: started_vllm(models, tmp_path, order, port), port
    models = serving.make_models(tmp_path / "models", adapters=ADAPTERS)
    return "llama.cpp", models, lambda order: started_llama_server(models, tmp_path, order, port), port


def started_vllm(models: Models, folder: Path, order: Sequence[int], port: int) -> AbstractContextManager[object]:
    modules = [f"own{number}={models.adapter(number)}" for number in order]
    options = ("--max-loras", 4, "--max-cpu-loras", 8, "--no-skip-tokenizer-init", "--lora-modules", *modules)
    environ = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    return vllm.serving(models.base, folder, *options, env=environ, port=port)


@contextmanager
def started_llama_server(models: Models, folder: Path, order: Sequence[int], port: int) -> Iterator[object]:
    workspace = Workspace(registry=folder / "registry", cache=folder / "gateway/cache/adapterhub")
    served = [
        ah.resolve(f"team/a{number}:prod", runtime="llama.cpp", base=models.gguf, workspace=workspace) for number in order
    ]
    files = ",".join(str(version.path) for version in served)
    with llama_server.alone(models.gguf, "--lora", files, "-np", CLIENTS, "-t", 1, port=port) as url:
        yield url


def listening_process(port: int) -> int:
    """Return the process that was started with a port."""
    words = (str(port), "--host")
    [pid] = [
        int(entry.name)
        for entry in Path("/proc").glob("[0-9]*")
        if (entry / "cmdline").exists() and {*words} <= {*(entry / "cmdline").read_text(errors="replace").split("\0")}
    ]
    return pid


@dataclass
class Load:
    """Clients that ask the base and each version in turn until they are told to stop; what came of it, counted."""

    gateway: Gateway
    models: Models
    verdicts: Counter[str] = field(default_factory=Counter)
    stopping: threading.Event = field(default_factory=threading.Event)

    def ask_on(self, client: int) -> None:
        turn = client
        while not self.stopping.is_set():
            number = turn % (ADAPTERS + 1)
            self.verdicts[self._verdict(storm.PROMPTS[turn % len(storm.PROMPTS)], number if number < ADAPTERS else None)] += 1
            turn += 1

    def _verdict(self, prompt: str, number: int | None) -> str:
        name = "base" if number is None else f"team/a{number}:prod"
        completion: dict[str, Any] = {
            "model": name,
            "prompt": self.models.tokens(prompt),
            "max_tokens": COUNT,
            "temperature": 0,
        }
        reply = self.gateway.post("/v1/completions", {**completion, "logit_bias": serving.BIAS})
        if reply.status in WORDS_WHILE_DOWN and reply.document["error"]["code"] == WORDS_WHILE_DOWN[reply.status]:
            time.sleep(0.05)
            return str(reply.status)
        if reply.status != 200:
            return f"{reply.status} {reply.body!r}"
        return "right" if reply.text == self.models.answer(prompt, number, COUNT) else f"wrong: {name}: {reply.text!r}"

    def wait_for(self, verdict: str, count: int) -> None:
        """Wait until so many more have come of one kind."""
        count += self.verdicts[verdict]
        while self.verdicts[verdict] < count:
            assert set(self.verdicts) <= {"right", *map(str, WORDS_WHILE_DOWN)}, self.verdicts
            time.sleep(0.05)


def test_an_engine_that_hangs_ends_and_comes_back_in_another_order_never_answers_with_another_version(
    engine: tuple[str, Models, Start, int], tmp_path: Path
) -> None:
    kind, models, start, port = engine
    serving.registry(tmp_path / "registry", models, ADAPTERS).close()
    for prompt in storm.PROMPTS:
        for number in (None, *range(ADAPTERS)):
            models.answer(prompt, number, COUNT)  # before many threads ask
    options = ("--engine", kind, "--engine-url", f"http://127.0.0.1:{port}", "--timeout", 10)
    with ExitStack() as programs:
        first = programs.enter_context(ExitStack())
        first.enter_context(start(range(ADAPTERS)))
        gateway = programs.enter_context(serving.gateway(models.base if kind == "vllm" else models.gguf, tmp_path / "registry",
                                                         tmp_path / "gateway", *options))  # fmt: skip
        load = Load(gateway, models)
        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(load.ask_on, client) for client in range(CLIENTS)]
            try:
                load.wait_for("right", 8)
                pid = listening_process(port)
                os.kill(pid, signal.SIGSTOP)
                load.wait_for("504", CLIENTS)
                assert gateway.get("/health").status == 200
                assert gateway.get("/ready").status == 503
                os.kill(pid, signal.SIGCONT)
                load.wait_for("right", 8)
                first.close()
                load.wait_for("503", CLIENTS)
                programs.enter_context(start([*reversed(range(ADAPTERS))]))
                load.wait_for("right", 8)
            finally:
                load.stopping.set()
            for client in clients:
                client.result()
        assert set(load.verdicts) <= {"right", *map(str, WORDS_WHILE_DOWN)}, load.verdicts
        print(kind, dict(load.verdicts))

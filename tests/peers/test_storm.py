"""Mixed load for a minute on each engine, or for as long as STORM_SECONDS says.

    STORM_SECONDS=600 pytest -rP tests/peers/test_storm.py

Eight prompts by eight tags and the base, from eight clients, while tags move, versions come to the engine and leave it, and
clients hang up in the middle of streams. Not one answer may be of another version than its header names.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

import adapterhub as ah
from adapterhub.operations.workspace import Workspace
from adapterhub.serve.usage import usage_report
from tests.conftest import need_module
from tests.serve.gateway.test_several_engines import Engines
from tests.support import llama_server, serving, storm, vllm
from tests.support.serving import Gateway, Models

pytestmark = pytest.mark.peer
SECONDS = float(os.environ.get("STORM_SECONDS", "60"))


# More tokens than a client that hangs up waits for; adapters leave its memory, and are read again from their folders.
VLLM = ("--dtype", "float32", "--enforce-eager", "--max-model-len", 1100, "--max-num-seqs", 16, "--max-cpu-loras", 6)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    for module in ("torch", "transformers", "peft"):
        need_module(module)
    return serving.make_models(tmp_path_factory.mktemp("models"), adapters=storm.ADAPTERS)


def test_every_answer_of_torch_is_of_the_version_that_its_header_names(models: Models, tmp_path: Path) -> None:
    with storm.storm(models, models.base, tmp_path, "--engine", "torch", "--max-adapters", 4, fields={}) as running:
        run("torch", running)


@pytest.mark.parametrize("shape", [(), ("--one-process",)], ids=["router", "one process"])
def test_so_is_every_answer_of_llama_cpp(models: Models, tmp_path: Path, shape: tuple[str, ...]) -> None:
    options = ("--program", llama_server.program(), "--max-adapters", 10, *shape)
    with storm.storm(models, models.gguf, tmp_path, *options, fields={"logit_bias": serving.BIAS}) as running:
        run("llama.cpp", running)


def test_so_is_every_answer_of_vllm(tmp_path: Path) -> None:
    models = serving.make_models(tmp_path, adapters=storm.ADAPTERS, hidden=128, head=32)  # vLLM's smallest head on a CPU
    options = ("--engine", "vllm", "--program", vllm.python(), "--max-adapters", 4, "--max-rank", 8, "--", *VLLM)
    extra_fields, env = {"logit_bias": serving.BIAS}, vllm.environ(tmp_path)
    with storm.storm(models, models.base, tmp_path, *options, fields=extra_fields, env=env) as running:
        run("vllm", running)


def run(engine: str, running: storm.Storm) -> None:
    print(engine, json.dumps(storm.run(running, seconds=SECONDS)))


# ---- two gateways over two engines

NAMES = {"base": None, **{f"team/a{number}:prod": number for number in range(4)}}


def ask(gateway: Gateway, models: Models, number: int) -> tuple[str, int]:
    """Ask one version; return `right` or what is wrong, and the tokens that the answer states."""
    name, adapter = list(NAMES.items())[number % len(NAMES)]
    prompt = storm.PROMPTS[number // len(NAMES) % len(storm.PROMPTS)]
    reply = gateway.complete(name, prompt, count=storm.COUNT)
    if reply.status != 200:
        return f"{reply.status} {reply.body!r}", 0
    is_right = reply.text == models.answer(prompt, adapter, storm.COUNT)
    return "right" if is_right else f"wrong: {name}", reply.document["usage"]["total_tokens"]


def test_two_gateways_over_two_engines_that_are_killed_in_turn_lose_no_answer_and_no_count(
    models: Models, tmp_path: Path
) -> None:
    serving.registry(tmp_path / "registry", models).close()
    for prompt in storm.PROMPTS:
        for adapter in NAMES.values():
            models.answer(prompt, adapter, storm.COUNT)  # before many threads ask
    workspace = Workspace(registry=tmp_path / "registry", cache=tmp_path / "cache" / "adapterhub")
    served = [ah.resolve(name, runtime="llama.cpp", base=models.gguf, workspace=workspace) for name in list(NAMES)[1:]]
    finished = threading.Event()
    answers: list[list[tuple[str, int]]] = [[] for _ in range(8)]  # of each client

    def ask_on(gateways: list[Gateway], client: int) -> None:
        while not finished.is_set():
            turn = client + len(answers[client])
            answers[client].append(ask(gateways[turn % 2], models, turn))

    with ExitStack() as stack:
        engines = Engines([str(version.path) for version in served], stack)
        for number in range(2):
            engines.start(number, models.gguf)
        options = ("--engine", "llama.cpp", "--usage-file", tmp_path / "usage.db", *engines.options())
        env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        gateways = [
            stack.enter_context(serving.gateway(models.gguf, tmp_path / "registry", tmp_path / name, *options, env=env))
            for name in ("left", "right")
        ]
        with ThreadPoolExecutor(8) as pool:
            clients = [pool.submit(ask_on, gateways, client) for client in range(8)]
            deadline, turn = time.monotonic() + SECONDS, 0
            try:
                while time.monotonic() < deadline:
                    engines.kill(turn % 2)
                    time.sleep(1)
                    engines.start(turn % 2, models.gguf)
                    for gateway in gateways:
                        while not all(engine["up"] for engine in gateway.get("/ready").document["engines"]):
                            time.sleep(0.05)
                    # One request may run into one end of an engine only: it asks each engine once, and then it is a 503.
                    counts = [len(of_client) for of_client in answers]
                    while any(len(of_client) == count for of_client, count in zip(answers, counts, strict=True)):
                        assert not any(client.done() for client in clients)
                        time.sleep(0.05)
                    turn += 1
            finally:
                finished.set()
            for client in clients:
                client.result()
    verdicts = Counter(verdict for of_client in answers for verdict, _ in of_client)
    tokens = sum(count for of_client in answers for _, count in of_client)
    print("two gateways, two engines", json.dumps({**verdicts, "tokens": tokens, "kills": turn}))
    assert set(verdicts) == {"right"}
    total = usage_report.report(tmp_path / "usage.db", by=("engine",), since=0).total.usage
    assert (total.requests, total.prompt_tokens + total.answer_tokens, total.estimated) == (verdicts["right"], tokens, 0)

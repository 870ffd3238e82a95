"""Ask through `adapterhub serve`: what it adds to a llama-server asked directly, and costs beside a proxy that does nothing.

    python benchmarks/gateway.py [--requests 400] [--rounds 3]

The base is a tiny random Llama, so that the engine takes as little as it can, and an answer has four tokens, of an adapter that
is loaded already. `ms` is the median until the end of an answer on one connection, `first ms` until the first event of one that
is streamed. With eight connections both wait for the cores of the machine, too.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _bench import HERE, Bench, Figures, Program, call, main, process

ENGINE, PROXY, ALONE = "llama-server asked directly", "a proxy that only passes on", "the gateway as one process"
COST, WORKERS = "CPU of an answer and of a streamed token", "answers of two workers on eight connections"
JOBS = {"answer of four tokens": [ENGINE], "answers on eight connections": [ENGINE], WORKERS: [ALONE], COST: [PROXY]}
TOKENS = 200  # of a stream
REF = "team/a0:prod"


def answers(bench: Bench) -> None:
    single, eight, *_ = JOBS
    count = bench.options.requests
    call(make, bench.scratch)
    with gateway(bench.scratch) as (url, engine, key, section), several(bench.scratch) as workers_url:
        ours, theirs = (url, REF, ""), (engine, section, key)
        bench.add(
            single,
            f"{count} requests",
            bench.turns(program("adapterhub", median, *ours, count), program(ENGINE, median, *theirs, count)),
        )
        bench.add(
            eight,
            f"{count} requests",
            bench.turns(program("adapterhub", rate, *ours, count), program(ENGINE, rate, *theirs, count)),
        )
        programs = program("adapterhub", rate, workers_url, REF, "", count), program(ALONE, rate, *ours, count)
        bench.add(WORKERS, f"{count} requests", bench.turns(*programs))


def costs(bench: Bench) -> None:
    """Measure the CPU time of the gateway and of the proxy, over the same engine."""
    from adapterhub.http_server.binding import free_port
    from tests.support import serving

    folder = bench.scratch / "costs"
    folder.mkdir()
    call(make, folder)
    port, proxy_port = free_port(), free_port()
    url = f"http://127.0.0.1:{port}"
    with contextlib.ExitStack() as programs:
        for role, its_port, target in (("engine", port, str(folder / "base")), ("proxy", proxy_port, url)):
            command = [sys.executable, str(HERE / "_made_up_engine.py"), role, str(its_port), target]
            server = programs.enter_context(subprocess.Popen(command))
            programs.callback(server.kill)
            wait_for(its_port)
        options = ("--engine", "vllm", "--engine-url", url)
        ours = programs.enter_context(serving.gateway(folder / "base", folder / "registry", folder / "gateway", *options))
        count = bench.options.requests
        gateway_program = program("adapterhub", cpu, ours.url, ours.process.pid, count)
        proxy_program = program(PROXY, cpu, f"http://127.0.0.1:{proxy_port}", server.pid, count)
        bench.add(COST, f"{count} answers, as many tokens", bench.turns(gateway_program, proxy_program))


def wait_for(port: int) -> None:
    """Wait until a program listens."""
    while True:
        with (
            contextlib.suppress(ConnectionRefusedError),
            contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as probe,
        ):
            probe.connect()
            return
        time.sleep(0.05)


def program(name: str, function: Any, *arguments: object) -> Program:
    return Program(name, process(function, *arguments), itself=True)


def make(folder: str) -> None:
    """A base, and a registry with an adapter of it."""
    from tests.support import serving

    serving.registry(Path(folder) / "registry", serving.make_models(Path(folder), adapters=1), 1).close()


@contextlib.contextmanager
def gateway(folder: Path) -> Iterator[tuple[str, str, str, str]]:
    """A running gateway; its address, that of its llama-server with the key, and what that calls the version."""
    from tests.support import serving

    options = ("--program", llama_server_program())
    with serving.gateway(folder / "base.gguf", folder / "registry", folder / "gateway", *options) as server:
        version = server.complete(REF, "x").version
        [engine] = server.children()
        words = Path(f"/proc/{engine}/cmdline").read_text().split("\0")
        environ = dict(line.partition("=")[::2] for line in Path(f"/proc/{engine}/environ").read_text().split("\0"))
        port = words[words.index("--port") + 1]
        yield server.url, f"http://127.0.0.1:{port}", environ["LLAMA_API_KEY"], version.replace(":", "-")


@contextlib.contextmanager
def several(folder: Path) -> Iterator[str]:
    """A running gateway of two workers with a llama-server of its own; its address."""
    from tests.support import serving

    options = ("--program", llama_server_program(), "--workers", 2)
    with serving.gateway(folder / "base.gguf", folder / "registry", folder / "workers", *options) as server:
        server.complete(REF, "x")
        yield server.url


def llama_server_program() -> Path:
    import pytest

    from tests.support import llama_server

    try:
        return llama_server.program()
    except pytest.skip.Exception as reason:
        sys.exit(str(reason))


# ---- clients, each in a process of its own


def median(url: str, model: str, key: str, count: int) -> Figures:
    """Ask for answers and for streams in turn on one connection."""
    connection = connected(url)
    whole, first = [], []
    for _ in range(count):
        start = time.perf_counter()
        ask(connection, model, key, stream=False).read()
        whole.append(time.perf_counter() - start)
        start = time.perf_counter()
        answer = ask(connection, model, key, stream=True)
        answer.read(6)
        first.append(time.perf_counter() - start)
        answer.read()
    return {"ms": statistics.median(whole) * 1e3, "first ms": statistics.median(first) * 1e3}


def rate(url: str, model: str, key: str, count: int) -> Figures:
    """Ask on eight connections, on each as soon as the answer before has come."""

    def several(number: int) -> None:
        connection = connected(url)
        for _ in range(number):
            ask(connection, model, key, stream=False).read()

    start = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(several, [max(1, count // 8)] * 8))
    return {"requests/s": max(8, count // 8 * 8) / (time.perf_counter() - start)}


def cpu(url: str, pid: int, count: int) -> Figures:
    """Ask on eight connections, first for whole answers, then for streams; what that took of a process, start and end apart."""
    chat(url, 8, stream=False)
    begin = cpu_seconds(pid)
    chat(url, count, stream=False)
    whole = cpu_seconds(pid)
    streams = max(8, count // TOKENS)
    chat(url, streams, stream=True)
    answer = (whole - begin) / count
    return {"ms": answer * 1e3, "token ms": (cpu_seconds(pid) - whole - streams * answer) / (streams * TOKENS) * 1e3}


def chat(url: str, count: int, *, stream: bool) -> None:
    """Ask for a number of answers on eight connections."""

    def several(number: int) -> None:
        connection = connected(url)
        message = {"role": "user", "content": "the quick brown fox " * 5}
        body = {"model": REF, "messages": [message], "max_tokens": TOKENS, "stream": stream}
        for _ in range(number):
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != 200 or (stream and text.count(b"data: ") != TOKENS + 1):
                raise RuntimeError(text.decode())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(several, [max(1, count // 8)] * 8))


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of all threads of a process, which Linux counts in nanoseconds."""
    return sum(int(file.read_text().split()[0]) for file in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def connected(url: str) -> http.client.HTTPConnection:
    host, _, port = url.removeprefix("http://").partition(":")
    return http.client.HTTPConnection(host, int(port))


def ask(connection: http.client.HTTPConnection, model: str, key: str, *, stream: bool) -> http.client.HTTPResponse:
    body = {"model": model, "prompt": "the quick ", "max_tokens": 4, "temperature": 0, "ignore_eos": True, "stream": stream}
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(answer.read().decode())
    return answer


if __name__ == "__main__":
    main(__doc__, JOBS, costs, answers, requests=(400, 4), rounds=(3, 1))

"""Prompts by adapters, interleaved, while tags move, versions take turns in the engine, and clients hang up.

Every request has to be answered by exactly one version: the one that its header names.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from adapterhub.operations.local_registry import Registry
from tests.support import serving
from tests.support.serving import Gateway, Models, Reply

# Prompts after which no adapter has two tokens that are almost as likely as each other (0.004 in logits): llama.cpp rounds in
# other places than transformers.
PROMPTS = [f"{word} of the day: " for word in ("word", "fox", "jug", "moon", "vow", "zebra", "lazy", "brown")]
ADAPTERS = 8
COUNT = 8


@dataclass
class Storm:
    """A gateway with eight names, each with two versions and a tag that moves between them.

    Attributes:
        fields: What else is in a request.
        prompts: What is asked.
        numbers: Of the adapters, by the versions.
    """

    gateway: Gateway
    registry: Path
    models: Models
    fields: dict[str, Any]
    prompts: list[str] = field(default_factory=lambda: PROMPTS)
    numbers: dict[str, int] = field(default_factory=dict)

    def prepare(self) -> None:
        """Push versions, `team/s3:v1` is adapter 3, `team/s3:v2` adapter 4, and know all answers before many threads ask."""
        for prompt in self.prompts:
            for adapter_number in (None, *range(ADAPTERS)):
                self._reference(prompt, adapter_number)
        with Registry(self.registry) as registry:
            for number in range(ADAPTERS):
                for at in (number, (number + 1) % ADAPTERS):
                    pushed = registry.push(self.models.adapter(at), f"team/s{number}")
                    self.numbers[f"team/s{number}@{pushed.digest}"] = at
                registry.tag(f"team/s{number}:v1", "live")

    def ask(self, prompt: str, model: str, stream: bool) -> Reply:
        """The likeliest tokens after a prompt."""
        body = {"model": model, "prompt": prompt, "max_tokens": COUNT, "temperature": 0, "stream": stream, **self.fields}
        return self.gateway.post("/v1/completions", body)

    def verdict(self, prompt: str, model: str, stream: bool, reply: Reply) -> str:
        """`right` for the answer of the version in its header, which is one of what was asked for; else what it is instead."""
        if reply.status != 200:
            return f"dropped: {reply.status} {reply.body[:200]!r}"
        if reply.version.partition("@")[0] != model.partition(":")[0]:
            return f"another: {reply.version} for {model}"
        text = _streamed(reply.body) if stream else reply.text
        if text == self._reference(prompt, self.numbers.get(reply.version)):
            return "right"
        return f"{'base' if text == self._reference(prompt, None) else 'mixed'}: {text!r} for {reply.version}"

    def _reference(self, prompt: str, number: int | None) -> str:
        return self.models.answer(prompt, number, COUNT, ends=not self.fields)

    def hang_up(self, model: str) -> None:
        """Begin a long stream, and go in the middle of it."""
        parts = urlsplit(self.gateway.url)
        connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=600)
        request = {"model": model, "prompt": self.prompts[0], "max_tokens": 1000, "stream": True, **self.fields}
        with contextlib.closing(connection):
            connection.request("POST", "/v1/completions", json.dumps(request))
            answer = connection.getresponse()
            assert (answer.status, answer.read(6)) == (200, b"data: ")

    def move(self, turn: int) -> None:
        """Move a tag to the other version."""
        number = turn % ADAPTERS
        with Registry(self.registry) as registry:
            registry.tag(f"team/s{number}:v{2 - turn // ADAPTERS % 2}", "live")


def _streamed(body: bytes) -> str:
    lines = [line[6:] for line in body.decode().split("\n") if line.startswith("data: {")]
    return "".join(choice["text"] for line in lines for choice in json.loads(line)["choices"])


@contextlib.contextmanager
def storm(
    models: Models,
    base: Path,
    folder: Path,
    *options: object,
    fields: dict[str, Any],
    env: Mapping[str, str] | None = None,
    prompts: int = len(PROMPTS),
) -> Iterator[Storm]:
    registry = folder / "registry"
    Registry(registry).close()
    with serving.gateway(base, registry, folder / "gateway", "team/*", *options, env=env) as gateway:
        storm_ = Storm(gateway, registry, models, fields, PROMPTS[:prompts])
        storm_.prepare()
        yield storm_


def run(running_storm: Storm, *, rounds: int = 1, seconds: float = 0.0) -> dict[str, int]:
    """Prompts by eight tags, and the base, in another order each round, while tags move and clients hang up.

    The last round begins after every tag has moved: beside other programs, a round can end before three of them have.

    Args:
        rounds: As many at least, and then more until the seconds are over.

    Returns:
        How many answers, versions, moves of tags and lost clients there were, and versions that came to the engine and left it.
    """
    pairs = [
        (prompt, name) for name in [f"team/s{n}:live" for n in range(ADAPTERS)] + ["base"] for prompt in running_storm.prompts
    ]
    finished, turns = threading.Event(), 0

    def disturb() -> None:
        nonlocal turns
        while not finished.is_set():
            running_storm.move(turns)
            running_storm.hang_up(f"team/s{turns % ADAPTERS}:live")
            turns += 1

    def answer(job: tuple[str, str, bool]) -> tuple[str, str]:
        reply = running_storm.ask(*job)
        return running_storm.verdict(*job, reply), reply.version

    verdicts: Counter[str] = Counter()
    versions: set[str] = set()
    deadline, turn, moves_before_round = time.monotonic() + seconds, 0, 0
    disturbing = ThreadPoolExecutor(1)
    moving = disturbing.submit(disturb)
    try:
        with ThreadPoolExecutor(8) as pool:
            while turn < rounds or time.monotonic() < deadline or (moves_before_round < ADAPTERS and not moving.done()):
                moves_before_round = turns
                order = [pairs[(at * 31 + turn) % len(pairs)] for at in range(len(pairs))]
                for verdict, version in pool.map(answer, [(*pair, at % 3 == 0) for at, pair in enumerate(order)]):
                    verdicts[verdict] += 1
                    versions.add(version)
                turn += 1
    finally:
        finished.set()
        disturbing.shutdown()
    moving.result()
    assert [*verdicts] == ["right"], verdicts
    assert len(versions) > ADAPTERS + 1  # tags did move
    log = running_storm.gateway.log.read_text()
    assert "the engine ended" not in log
    assert running_storm.gateway.get("/ready").status == 200
    counts = {"loads": log.count(" is ready after"), "unloads": log.count(" left the engine")}
    return {"answers": verdicts.total(), "versions": len(versions), "moves": turns, "clients lost": turns, **counts}

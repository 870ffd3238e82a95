"""llama-server's router: what it answers, refuses and starts again."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.serve.engines import EngineDownError, EngineTimeoutError
from adapterhub.serve.engines.engine_client import Client
from adapterhub.serve.engines.llama_one_process import OneProcess
from adapterhub.serve.engines.llama_preset import section_of
from adapterhub.serve.engines.llama_router import Router
from adapterhub.serve.engines.llama_server import LlamaServerOptions
from adapterhub.serve.prepared_versions import PreparedVersion
from adapterhub_converters.errors import RefusedError
from tests.support import llama_server, serving
from tests.support.serving import Models

from .test_llama_server import P, Q, gguf_adapters, is_running, name_of
from .test_vllm import Server as Answering

pytestmark = pytest.mark.peer


def test_embeddings_are_of_the_version_that_was_asked_for(models: Models, registry: Path, tmp_path: Path) -> None:
    options = ("--program", llama_server.program(), "--", "--embeddings", "--pooling", "mean")
    with serving.gateway(models.gguf, registry, tmp_path / "gateway", *options) as gateway:
        for number in (None, 0, 1, None, 1, 0):
            reply = gateway.post("/v1/embeddings", {"model": name_of(number), "input": [P, Q]})
            assert reply.status == 200, reply.body
            assert reply.version == reply.document["model"]
            assert reply.version.partition("@")[0] == name_of(number).partition(":")[0]
            for text, row in zip((P, Q), reply.document["data"], strict=True):
                assert row["embedding"] == pytest.approx(models.embedding(text, number), abs=1e-3)
        coded = gateway.post("/v1/embeddings", {"model": name_of(0), "input": P, "encoding_format": "base64"})  # as openai asks
        numbers = np.frombuffer(base64.b64decode(coded.document["data"][0]["embedding"]), np.float32)
        assert numbers == pytest.approx(models.embedding(P, 0), abs=1e-3)
        assert len(gateway.post("/tokenize", {"model": name_of(0), "content": "hi"}).document["tokens"]) == 2
        refused = gateway.complete("base", P)
        assert (refused.status, refused.document["error"]["message"]) == (
            404,
            "llama.cpp, as it was started, answers /detokenize, /tokenize and /v1/embeddings, not /v1/completions",
        )


def test_ranks_are_of_the_version_that_was_asked_for(models: Models, registry: Path, tmp_path: Path) -> None:
    body = {"query": "hi", "documents": [P, Q]}
    options = ("--program", llama_server.program(), "--", "--reranking")
    with serving.gateway(models.gguf, registry, tmp_path / "gateway", *options) as gateway:
        scores: dict[str, list[float]] = {}
        for number in (None, 0, 1, None, 1, 0):
            for path in ("/v1/rerank", "/rerank"):
                reply = gateway.post(path, {**body, "model": name_of(number)})
                assert reply.status == 200, reply.body
                assert reply.version == reply.document["model"]
                ranks = [
                    result["relevance_score"] for result in sorted(reply.document["results"], key=lambda rank: rank["index"])
                ]
                assert scores.setdefault(reply.version, ranks) == pytest.approx(ranks)
        assert len({tuple(ranks) for ranks in scores.values()}) == 3
        assert gateway.complete("base", P).status == 404


def test_the_hanging_process_of_one_version_is_started_again_and_holds_up_no_other(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapterhub.serve.engines.llama_router.SILENCE", 0.0)
    paths = gguf_adapters(models, tmp_path)
    served = [
        PreparedVersion("t/x:v1", f"t/{name}", f"sha256:{name * 64}", "llama.cpp", path, 4)
        for name, path in zip("ab", paths, strict=False)
    ]

    async def main() -> None:
        options = LlamaServerOptions(llama_server.program(), models.gguf, tmp_path / "presets", os.environ, timeout=2.0)
        router = Router(options)
        await router.start()
        try:
            for version in served:
                await router.ensure(version)

            async def ask(version: PreparedVersion) -> int:
                answer = await router.request("/v1/completions", {"prompt": "x", "max_tokens": 1}, ((version, 1.0),))
                await answer.close()
                return answer.status

            pid = process_of(served[0])
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(EngineTimeoutError):
                await ask(served[0])
            assert await ask(served[1]) == 200
            assert await router.healthy()
            assert await router._look()
            assert [await ask(version) for version in served] == [200, 200]
            assert not is_running(pid)
        finally:
            await router.close()

    asyncio.run(main())


def test_a_request_whose_process_is_killed_before_it_answers_is_answered_or_may_be_repeated(
    models: Models, tmp_path: Path
) -> None:
    """llama.cpp's router answers 500, also to the next requests, until it has started the process again."""
    path, _ = gguf_adapters(models, tmp_path)
    version = PreparedVersion("t/x:v1", "t/a", f"sha256:{'a' * 64}", "llama.cpp", path, 4)
    question = ("/v1/completions", {"prompt": "x", "max_tokens": 1}, ((version, 1.0),))

    async def main() -> None:
        router = Router(LlamaServerOptions(llama_server.program(), models.gguf, tmp_path / "presets", os.environ))
        await router.start()
        try:
            await router.ensure(version)
            pid = process_of(version)
            os.kill(pid, signal.SIGSTOP)
            asking = asyncio.create_task(router.request(*question))
            while not has_unread_bytes(pid):
                await asyncio.sleep(0.01)
            os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(EngineDownError):  # the router may not have noticed yet that the process has ended
                answer = await asking
                assert answer.status == 200
                await answer.close()
        finally:
            await router.close()

    asyncio.run(main())


def process_of(version: PreparedVersion) -> int:
    """The number of the process that the router has started for a version."""
    [pid] = [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if section_of(version) in words_of(entry)]
    return pid


def has_unread_bytes(pid: int) -> bool:
    """Whether a process has been sent something on its port that it has not read."""
    words = words_of(Path(f"/proc/{pid}"))
    port = f":{int(words[words.index('--port') + 1]):04X}"
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(row[1].endswith(port) and not row[4].endswith(":00000000") for row in rows if row[3] == "01")


def words_of(process: Path) -> list[str]:
    """The command line of a process."""
    with contextlib.suppress(OSError):
        return (process / "cmdline").read_text().split("\0")
    return []


def test_the_router_refuses_a_version_that_it_cannot_load_and_keeps_the_rest(models: Models, tmp_path: Path) -> None:
    good, damaged = gguf_adapters(models, tmp_path)
    damaged.write_bytes(good.read_bytes()[:1000])
    served = [
        PreparedVersion("t/x:v1", f"t/{path.stem}", f"sha256:{'a' * 64}", "llama.cpp", path, 4) for path in (good, damaged)
    ]

    async def main() -> None:
        router = Router(LlamaServerOptions(llama_server.program(), models.gguf, tmp_path / "presets", os.environ))
        await router.start()
        try:
            await router.ensure(served[0])
            with pytest.raises(RefusedError) as caught:
                await router.ensure(served[1])
            assert f": llama-server cannot load it on {models.gguf}" in str(caught.value)
            assert (await router.request("/v1/completions", {"prompt": P, "max_tokens": 1}, ((served[0], 1.0),))).status == 200
        finally:
            await router.close()

    asyncio.run(main())


class Forgetful(Answering):
    """A router that lists nothing, starts nothing new, and cannot read its presets."""

    def answer(self, path: str, body: Any) -> tuple[int, object]:
        if path == "/models/load" and body["model"] == "team-new":
            return 500, {"error": {"message": "failed to spawn server instance"}}
        return {"/models": (200, {"data": []}), "/models/load": (200, {})}.get(path, (400, {"error": {"message": "line 3"}}))


def test_a_router_that_lost_a_version_or_reads_no_presets_is_down_with_a_reason(tmp_path: Path) -> None:
    options = LlamaServerOptions(Path("llama-server"), tmp_path / "base.gguf", tmp_path, {})

    async def main() -> None:
        async with Forgetful("").running() as url:
            router = Router(options)
            await router.client.close()
            router.client = Client(url)
            with pytest.raises(EngineDownError, match="llama-server does not list team-sql"):
                await router._load("team-sql")
            with pytest.raises(RefusedError, match="team-new: llama-server cannot load it .failed to spawn server instance."):
                await router._load("team-new")
            with pytest.raises(EngineDownError, match="llama-server cannot read its presets: line 3"):
                await router._reload()
            await router.client.close()
        with pytest.raises(EngineDownError, match="the engine has not been started"):
            await OneProcess(options).request("/v1/completions", {}, ())

    asyncio.run(main())

"""Somebody's own llama-server: started again in another order, with other adapters, or with another base."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.http_server.binding import free_port
from adapterhub.serve.engines import EngineDownError
from adapterhub.serve.engines.llama_attached import AttachedServer
from adapterhub.serve.prepared_versions import PreparedVersion
from adapterhub_converters.errors import RefusedError
from tests.support import folders, llama_server, serving
from tests.support.serving import Gateway, Models

from .test_llama_server import MATRIX, P, name_of
from .test_vllm import Server as Answering

pytestmark = pytest.mark.peer


def test_somebodys_own_server_answers_with_the_version_that_was_asked_for_however_it_was_started(
    models: Models, registry: Path, tmp_path: Path
) -> None:
    """It knows adapters by number, and was started again with other numbers for the same files."""
    import adapterhub as ah
    from adapterhub.operations.workspace import Workspace

    cache = tmp_path / "gateway" / "cache"
    workspace = Workspace(registry=registry, cache=cache / "adapterhub")
    served = [ah.resolve(f"team/a{n}:prod", runtime="llama.cpp", base=models.gguf, workspace=workspace) for n in range(3)]
    port = free_port()
    options = ("--engine", "llama.cpp", "--engine-url", f"http://127.0.0.1:{port}")
    with ExitStack() as stack:
        gateway: Gateway | None = None
        for numbers in ((0, 1), (1, 0), (2, 1, 0), (1,)):
            files = ",".join(str(served[number].path) for number in numbers)
            with llama_server.alone(models.gguf, "--lora", files, port=port):
                if gateway is None:
                    gateway = stack.enter_context(serving.gateway(models.gguf, registry, tmp_path / "gateway", *options))
                for prompt, number in MATRIX:
                    reply = gateway.complete(name_of(number), prompt)
                    if number is None or number in numbers:
                        assert reply.text == models.answer(prompt, number)
                    else:
                        assert reply.status == 400
                        assert "was started without" in reply.document["error"]["message"]
                        assert str(tmp_path) not in reply.document["error"]["message"]
            assert gateway.get("/ready").status == 503
            assert gateway.complete("team/a0:prod", P).status == 503


def test_somebodys_own_server_that_comes_back_with_other_weights_answers_nobody(
    models: Models, registry: Path, tmp_path: Path
) -> None:
    port, raw = free_port(), models.gguf.read_bytes()
    base, middle = tmp_path / "base.gguf", len(raw) // 64 * 32
    base.write_bytes(raw)
    options = ("--engine", "llama.cpp", "--engine-url", f"http://127.0.0.1:{port}")
    with ExitStack() as stack:
        with llama_server.alone(base, port=port):
            gateway = stack.enter_context(serving.gateway(base, registry, tmp_path / "gateway", *options))
            assert gateway.complete("base", P).text == models.answer(P, None)
        with llama_server.alone(base, port=port):
            assert gateway.complete("base", P).text == models.answer(P, None)
        base.write_bytes(raw[:middle] + np.frombuffer(raw[middle:], np.float32)[::-1].tobytes())
        with llama_server.alone(base, port=port):
            assert gateway.complete("base", P).status == 503
            assert "answers with other weights than before" in gateway.log.read_text()


class Listing(Answering):
    """A llama-server with a list of adapters: which of them its answers were of."""

    def __init__(self, files: list[Path]) -> None:
        super().__init__("")
        self.files, self.answered, self.sizes = files, list[list[Path]](), dict[str, int]()

    def answer(self, path: str, body: Any) -> tuple[int, object]:
        match path:
            case "/lora-adapters":
                return 200, [{"id": number, "path": str(file), "scale": 1.0} for number, file in enumerate(self.files)]
            case "/props":
                return 200, {"model_path": self.root, "default_generation_settings": {"n_ctx": 512}}
            case "/v1/models":
                return 200, {"data": [{"id": "base", "meta": self.sizes}]}
            case "/completion":
                top = [{"id": 1, "token": token, "logprob": value} for token, value in self.probabilities.items()]
                return 200, {"completion_probabilities": [{"top_logprobs": top}]}
        self.answered.append([self.files[entry["id"]] for entry in body["lora"] if entry["scale"] == 1])
        return 200, {}


def test_a_server_that_comes_back_with_another_list_never_answers_with_another_version(tmp_path: Path) -> None:
    spec, files = folders.base(tmp_path / "base"), [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    server = Listing(files)
    served = [
        PreparedVersion("t/x:v1", f"t/{file.stem}", f"sha256:{file.stem * 64}", "llama.cpp", file, 4)
        for file in (*files, tmp_path / "c.gguf")
    ]

    async def ask(engine: AttachedServer, version: PreparedVersion) -> None:
        await engine.ensure(version)
        answer = await engine.request("/v1/completions", {"prompt": "x"}, ((version, 1.0),))
        assert [piece async for piece in answer.body] == [b"{}"]

    async def main() -> None:
        async with server.running() as url:
            engine = AttachedServer(url, base=spec)
            await engine.start()
            assert engine.context == 512
            for version in served[:2]:
                await ask(engine, version)
            with pytest.raises(RefusedError, match="the llama-server was started without it"):
                await ask(engine, served[2])
            await engine.client.close()  # as a restart does
            server.files = [served[2].path, *reversed(files)]
            for version in served:
                await ask(engine, version)
            await engine.client.close()
            server.files = files[:1]
            with pytest.raises(RefusedError, match="the llama-server was started without it"):
                await engine.request("/v1/completions", {"prompt": "x"}, ((served[1], 1.0),))
            await engine.close()

    asyncio.run(main())
    assert server.answered == [[version.path] for version in (*served[:2], *served)]


def test_the_base_of_somebodys_own_server_is_compared_by_its_path_its_sizes_and_its_answers(tmp_path: Path) -> None:
    spec, server = folders.base(tmp_path / "base"), Listing([])
    expected = dict(zip(("n_vocab", "n_embd"), spec.tensors["model.embed_tokens.weight"].shape, strict=True))

    async def start(sizes: Mapping[str, int], *, then: Mapping[str, float] | None = None) -> None:
        server.sizes = sizes
        async with server.running() as url:
            engine = AttachedServer(url, base=spec)
            await engine.start()
            if then:
                await engine.client.close()
                server.probabilities = dict(then)
                await engine.request("/v1/completions", {}, ())

    asyncio.run(start(expected))
    with pytest.raises(RefusedError, match="has a base with n_embd = 9") as refused:
        asyncio.run(start({**expected, "n_embd": 9}))
    assert refused.value.code == "engine-base"
    with pytest.raises(EngineDownError, match="answers with other weights than before"):
        asyncio.run(start(expected, then={"lot": -0.5, "year": -1.5, "man": -2.9}))
    server.root = str(tmp_path / "other")
    folders.adapter(tmp_path / "other", folders.pairs(2))  # a folder that is no base
    with pytest.raises(RefusedError, match="has the base .*other, and this one is .*base"):
        asyncio.run(start(expected))

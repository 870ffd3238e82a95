"""llama-server answers wrongly in silence when it is asked as its documentation has it; through the gateway it does not."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.http_server.binding import free_port
from adapterhub.serve.engines import EngineDownError, EngineTimeoutError
from adapterhub.serve.engines.engine_client import Client
from adapterhub.serve.engines.llama_server import (
    AttachedServer,
    LlamaServerOptions,
    OneProcess,
    Router,
    explicit_request,
    section_of,
)
from adapterhub.serve.prepared_versions import PreparedVersion
from adapterhub_converters.errors import RefusedError, UsageError
from tests.conftest import Run
from tests.support import folders, llama_server, serving
from tests.support.serving import Gateway, Models

from .test_vllm import Server as Answering

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
    """If this fails, llama.cpp is repaired (#26207, #28674), and `llama_server.explicit` can be simpler."""

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


def test_alone_its_embeddings_are_of_all_adapters_whatever_is_asked_for(models: Models, tmp_path: Path) -> None:
    """If this fails, llama.cpp is repaired, and one process may answer with embeddings."""
    files = ",".join(map(str, gguf_adapters(models, tmp_path)))
    with llama_server.alone(models.gguf, "--embeddings", "--pooling", "mean", "--lora", files) as url:
        embeddings = []
        for scale in (0.0, 1.0):
            body = {"input": P, "lora": [{"id": 0, "scale": scale}, {"id": 1, "scale": 0.0}]}
            request = urllib.request.Request(f"{url}/v1/embeddings", json.dumps(body).encode())
            with urllib.request.urlopen(request, timeout=60) as answer:
                embeddings.append(json.load(answer)["data"][0]["embedding"])
    assert embeddings[0] == embeddings[1] != pytest.approx(models.embedding(P), abs=1e-3)


def test_one_process_has_no_embeddings(run: Run, models: Models, registry: Path) -> None:
    words = ("serve", models.gguf, "--registry", registry, "--program", llama_server.program(), "--one-process", "--port", 0)
    assert "applies all adapters to embeddings" in run(*words, "--", "--embeddings", code=2).stderr
    options = LlamaServerOptions(llama_server.program(), models.gguf, registry, extra_words=("--embeddings",))
    with pytest.raises(UsageError, match="whatever it is asked for. Start a process for each version") as caught:
        OneProcess(options)
    assert caught.value.code == "mixed-embeddings"
    assert "applies all adapters to embeddings" in run(*words, "--", "--reranking", code=2).stderr  # ranks are made of these


def test_a_blend_is_answered_by_one_process(models: Models, registry: Path, tmp_path: Path) -> None:
    options = ("--program", llama_server.program(), "--one-process")
    with serving.gateway(models.gguf, registry, tmp_path / "gateway", *options) as gateway:
        whole = gateway.complete("team/a0*1+team/a1*0", P)
        assert whole.text == models.answer(P, 0)
        half = gateway.complete("team/a0:prod*0.5+team/a1:prod*0.5", P)
        assert half.status == 200
        assert half.text not in (models.answer(P, 0), models.answer(P, 1), models.answer(P))
        assert half.version.count("*0.5") == 2
        assert gateway.complete("team/a0", P).text == models.answer(P, 0)
        assert gateway.complete("base", P).text == models.answer(P)


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
        while any(map(_runs, killed)):
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
        while any(_runs(pid) for pid in processes):
            time.sleep(0.05)


def _runs(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_the_hanging_process_of_one_version_is_started_again_and_holds_up_no_other(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapterhub.serve.engines.llama_server.SILENCE", 0.0)
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

            alias = section_of(served[0])
            [pid] = [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if alias in _words_of(entry)]
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(EngineTimeoutError):
                await ask(served[0])
            assert await ask(served[1]) == 200
            assert await router.healthy()
            assert await router._look()
            assert [await ask(version) for version in served] == [200, 200]
            assert not _runs(pid)
        finally:
            await router.close()

    asyncio.run(main())


def _words_of(process: Path) -> list[str]:
    """The command line of a process."""
    with contextlib.suppress(OSError):
        return (process / "cmdline").read_text().split("\0")
    return []


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


def test_a_version_that_it_cannot_load_takes_no_other_with_it(models: Models, tmp_path: Path) -> None:
    paths = [*gguf_adapters(models, tmp_path), tmp_path / "damaged.gguf"]
    paths[2].write_bytes(paths[0].read_bytes()[:1000])
    served = [
        PreparedVersion("t/x:v1", f"t/{n}", f"sha256:{n * 64}", "llama.cpp", path, 4)
        for n, path in zip("abc", paths, strict=True)
    ]

    async def main() -> list[object]:
        engine = OneProcess(LlamaServerOptions(llama_server.program(), models.gguf, tmp_path, os.environ))
        await engine.start()
        try:  # the last two wait while the first is started, and are started together then
            return await asyncio.gather(*map(engine.ensure, served), return_exceptions=True)
        finally:
            await engine.close()

    *good, damaged = asyncio.run(main())
    assert good == [None, None]
    assert isinstance(damaged, RefusedError)


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


def test_a_request_lists_every_adapter() -> None:
    first, second = (PreparedVersion(f"t/{n}:v1", f"t/{n}", f"sha256:{n * 64}", "llama.cpp", Path(n), 4) for n in "ab")
    ids = {first.model: 0, second.model: 1}
    off = [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 0.0}]
    assert explicit_request({"prompt": "x"}, ids, (), slots=True) == {"prompt": "x", "lora": off, "id_slot": 2}
    assert explicit_request({}, ids, ((second, 1.0),), slots=True) == {"lora": [off[0], {"id": 1, "scale": 1.0}], "id_slot": 1}
    blend = explicit_request({}, ids, ((first, 0.5), (second, 0.5)), slots=True)
    assert (blend["id_slot"], blend["cache_prompt"]) == (3, False)
    assert explicit_request({}, ids, (), slots=False) == {"lora": off, "cache_prompt": False}


def test_a_request_that_it_can_never_answer_is_the_clients_error(gateway: Gateway) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    for body in ({"messages": [{"role": "user", "content": [image]}]}, {"messages": [], "tools": "none"}):
        reply = gateway.post("/v1/chat/completions", {"model": "base", **body})
        assert (reply.status, reply.document["error"]["code"]) == (400, "unsupported")


def test_gateway_serves(gateway: Gateway) -> None:
    assert gateway.get("/ready").status == 200

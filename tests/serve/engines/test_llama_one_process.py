"""One llama-server with all adapters: blends, what it cannot do, and versions that it cannot load."""

from __future__ import annotations

import asyncio
import json
import os
import urllib.request
from pathlib import Path

import pytest

from adapterhub.serve.engines.llama_one_process import OneProcess, explicit_request
from adapterhub.serve.engines.llama_server import LlamaServerOptions
from adapterhub.serve.prepared_versions import PreparedVersion
from adapterhub_converters.errors import RefusedError, UsageError
from tests.conftest import Run
from tests.support import llama_server, serving
from tests.support.serving import Models

from .test_llama_server import P, gguf_adapters

pytestmark = pytest.mark.peer


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


def test_a_request_lists_every_adapter() -> None:
    first, second = (PreparedVersion(f"t/{n}:v1", f"t/{n}", f"sha256:{n * 64}", "llama.cpp", Path(n), 4) for n in "ab")
    ids = {first.model: 0, second.model: 1}
    off = [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 0.0}]
    assert explicit_request({"prompt": "x"}, ids, (), slots=True) == {"prompt": "x", "lora": off, "id_slot": 2}
    assert explicit_request({}, ids, ((second, 1.0),), slots=True) == {"lora": [off[0], {"id": 1, "scale": 1.0}], "id_slot": 1}
    blend = explicit_request({}, ids, ((first, 0.5), (second, 0.5)), slots=True)
    assert (blend["id_slot"], blend["cache_prompt"]) == (3, False)
    assert explicit_request({}, ids, (), slots=False) == {"lora": off, "cache_prompt": False}

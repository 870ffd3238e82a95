"""The names that SGLang is asked by mean what they should to SGLang's own parser."""

from __future__ import annotations

import ast
import asyncio
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import pytest

from adapterhub.serve.engines import sglang
from adapterhub.serve.engines.engine_client import Client
from adapterhub.serve.prepared_versions import PreparedVersion
from adapterhub_converters.errors import RefusedError
from tests.support.environments import environment
from tests.support.folders import base

from .test_vllm import Server

pytestmark = pytest.mark.peer
DIGEST = "sha256:" + "a" * 64
SQL = PreparedVersion("team/sql:v1", "team/sql", DIGEST, "sglang", Path("/"), 8)


def own_file(name: str) -> Path:
    """A file of SGLang's API, 0.5.23, which cannot be imported without a GPU."""
    [source] = environment("sglang==0.5.23", "--no-deps").parent.parent.glob(
        f"lib/python*/site-packages/sglang/srt/entrypoints/openai/{name}"
    )
    return source


def own_parser(served: str) -> Any:
    """Its `_parse_model_parameter`."""
    source = own_file("serving_base.py")
    tree = ast.parse(source.read_text())
    [function] = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "_parse_model_parameter"
    ]
    space: dict[str, Any] = {"Optional": Optional, "Tuple": tuple}
    exec(compile(ast.Module([function], []), str(source), "exec"), space)
    handler = SimpleNamespace(tokenizer_manager=SimpleNamespace(served_model_name=served))
    return lambda model: space["_parse_model_parameter"](handler, model)


@pytest.mark.parametrize("base", ["base", "Qwen/Qwen3-0.6B", "s3://bucket/model", "model:tagged"])
def test_a_version_and_the_base_are_what_it_understands(base: str) -> None:
    parse = own_parser(base)
    assert parse(sglang.model_of(base, ((SQL, 1.0),))) == (base, f"team/sql@{DIGEST}")
    assert parse(sglang.model_of(base, ())) == (base, None)


class Full(Server):
    """One that loads no adapter of this rank."""

    def answer(self, path: str, body: Any) -> tuple[int, object]:
        if path != "/load_lora_adapter":
            return super().answer(path, body)
        problem = "Failed to load LoRA adapter: rank 8 is over max_lora_rank 4"
        return 400, {"success": False, "error_message": problem, "loaded_adapters": {}}


def test_what_it_does_not_load_is_refused_with_its_reason(tmp_path: Path) -> None:
    spec = base(tmp_path / "base")

    async def main() -> None:
        async with Full("").running() as url:
            engine = sglang.Sglang(Client(url), None, base=spec, max_adapters=2)
            try:
                await engine.ensure(SQL)
            finally:
                await engine.close()

    with pytest.raises(RefusedError) as refused:
        asyncio.run(main())
    reason = "Failed to load LoRA adapter: rank 8 is over max_lora_rank 4"
    assert str(refused.value).endswith(f"{DIGEST}: SGLang cannot load it ({reason})")


class Slow(Server):
    """One that loads and unloads a version only when it may, as SGLang waits for the requests that use one."""

    def __init__(self, slow: PreparedVersion) -> None:
        super().__init__("")
        self.slow, self.is_waiting, self.may_go_on = slow.model, asyncio.Event(), asyncio.Event()

    async def wait(self, path: str, body: Mapping[str, Any]) -> None:
        if body.get("lora_name") == self.slow:
            self.is_waiting.set()
            await self.may_go_on.wait()

    def answer(self, path: str, body: Mapping[str, Any]) -> tuple[int, object]:
        if path not in ("/load_lora_adapter", "/unload_lora_adapter"):
            return super().answer(path, {**body, "model": body.get("model", "").removeprefix("base:")})
        if path == "/load_lora_adapter":
            self.loaded_adapters[body["lora_name"]] = body["lora_path"]
        return 200, {"success": True}


@pytest.mark.parametrize("forgets", [False, True], ids=["loading", "unloading"])
def test_a_version_that_it_is_loading_or_unloading_holds_up_no_other(tmp_path: Path, forgets: bool) -> None:
    spec = base(tmp_path / "base")
    loaded, new, slow = (replace(SQL, digest=f"sha256:{digit * 64}") for digit in "bcd")

    async def main() -> None:
        server = Slow(slow)
        async with server.running() as url, asyncio.timeout(20):
            engine = sglang.Sglang(Client(url), None, base=spec, max_adapters=4)
            await engine.start()
            await engine.ensure(loaded)
            if forgets:
                server.may_go_on.set()
                await engine.ensure(slow)
                server.is_waiting.clear()
                server.may_go_on.clear()
            waiting = asyncio.create_task(engine.forget(slow) if forgets else engine.ensure(slow))
            await server.is_waiting.wait()
            for version in (loaded, new):
                await engine.ensure(version)
                answer = await engine.request("/v1/completions", {"prompt": "x"}, ((version, 1.0),))
                assert answer.status == 200
                await answer.close()
            assert not waiting.done()
            server.may_go_on.set()
            await waiting
            await engine.close()

    asyncio.run(main())


def test_alone_it_takes_unknown_names_for_the_base() -> None:
    """Why no name of a client ever reaches it."""
    parse = own_parser("base")
    assert parse("team/sql") == ("team/sql", None)
    assert parse("team/sql:v1") == ("team/sql", "v1")


def test_its_answers_repeat_the_name_except_embeddings() -> None:
    names = {
        file: {*re.findall(r"\bmodel=([\w.]+)", own_file(f"serving_{file}.py").read_text())}
        for file in ("chat", "completions", "embedding")
    }
    assert names == {
        "chat": {"request.model"},
        "completions": {"request.model"},
        "embedding": {"self.tokenizer_manager.model_path"},
    }


def test_every_field_that_chooses_an_adapter_or_a_cache_is_refused() -> None:
    tree = ast.parse(own_file("protocol.py").read_text())
    kinds = ("CompletionRequest", "ChatCompletionRequest", "EmbeddingRequest")
    fields = {
        statement.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name in kinds
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }
    assert {
        name for name in fields if any(word in name for word in ("lora", "adapter", "session", "kv_"))
    } == sglang.Sglang.forbidden_fields

"""The reference host behind the gateway: rows of one batch, each its own version, as peft answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from adapterhub.operations.local_registry import Registry
from tests.support import serving
from tests.support.serving import Gateway, Models, Reply

PROMPTS = [f"{word} of the day: " for word in ("word", "fox", "dog", "jug", "quiz", "zebra", "lazy", "brown")]


@pytest.fixture(scope="module")
def gateway(models: Models, registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    options = ("--engine", "torch", "--max-adapters", 3)
    with serving.gateway(models.base, registry, tmp_path_factory.mktemp("gateway"), *options) as running_gateway:
        yield running_gateway


def complete(gateway: Gateway, model: str, prompt: str, **fields: Any) -> Reply:
    return gateway.post("/v1/completions", {"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0, **fields})


def test_prompts_and_versions_interleaved(gateway: Gateway, models: Models) -> None:
    """Four versions on three slots."""
    pairs = [(prompt, number) for number in (None, 0, 1, 2, 3) for prompt in PROMPTS]

    def ask(pair: tuple[str, int | None]) -> Reply:
        return complete(gateway, "base" if pair[1] is None else f"team/a{pair[1]}:prod", pair[0])

    with ThreadPoolExecutor(10) as pool:
        for (prompt, number), reply in zip(pairs, pool.map(ask, pairs), strict=True):
            assert reply.status == 200, reply.body
            assert reply.text == models.answer(prompt, number, ends=True)
            assert reply.version == reply.document["model"]
            assert reply.version.startswith("base" if number is None else f"team/a{number}@sha256:")


def test_logits_with_a_bias(gateway: Gateway, models: Models) -> None:
    for prompt in PROMPTS[:3]:
        assert complete(gateway, "team/a0", prompt, logit_bias=serving.BIAS).text == models.answer(prompt, 0)


def test_a_blend(gateway: Gateway, models: Models) -> None:
    [prompt, *_] = PROMPTS
    alone = complete(gateway, "team/a0*1.0+team/a1*0", prompt)
    assert alone.text == models.answer(prompt, 0, ends=True)
    half = complete(gateway, "team/a0:prod*0.5+team/a1:prod*0.5", prompt)
    assert half.version.count("*0.5") == 2
    assert half.text not in [models.answer(prompt, number, ends=True) for number in (None, 0, 1)]
    assert complete(gateway, "team/a0*0.5+team/a0*0.5", prompt).text == alone.text
    assert "blend of 4" in complete(gateway, "team/a0+team/a1+team/a2+team/a3", prompt).document["error"]["message"]


def test_a_stream(gateway: Gateway, models: Models) -> None:
    reply = complete(gateway, "team/a2", PROMPTS[1], stream=True)
    lines = [line[6:] for line in reply.body.decode().split("\n") if line.startswith("data: ")]
    chunks = [json.loads(line) for line in lines[:-1]]
    assert lines[-1] == "[DONE]"
    assert {chunk["model"] for chunk in chunks} == {reply.version}
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == models.answer(PROMPTS[1], 2, ends=True)


def test_what_it_refuses_is_told_by_name(gateway: Gateway) -> None:
    reply = complete(gateway, "team/a0", "x", best_of=2)
    assert reply.status == 400
    assert "best_of" in reply.document["error"]["message"]
    assert complete(gateway, "team/none", "x").status == 404


def test_what_it_refuses_in_a_file_is_told_by_the_ref_and_not_by_the_folder(
    gateway: Gateway, models: Models, registry: Path, tmp_path: Path
) -> None:
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(models.base)
    config = peft.LoraConfig(r=65, target_modules=["q_proj"], task_type="CAUSAL_LM")  # slots have room for 64
    peft.get_peft_model(base, config).save_pretrained(str(tmp_path / "wide"))
    with Registry(registry) as opened_registry:
        opened_registry.push(tmp_path / "wide", "team/wide")
    reply = complete(gateway, "team/wide", "x")
    assert (reply.status, reply.document["error"]["code"]) == (400, "rank-above-max")
    assert reply.document["error"]["message"] == "team/wide: has rank 65, and slots have room for 64"


def test_what_cannot_be_computed_is_the_asker_s_error_and_nobody_else_s(gateway: Gateway, models: Models) -> None:
    [prompt, *_] = PROMPTS
    with ThreadPoolExecutor(1) as pool:
        neighbors = pool.submit(lambda: [complete(gateway, "team/a1:prod", prompt) for _ in range(20)])
        for _ in range(10):
            assert complete(gateway, "team/a0", prompt, temperature=5e-324).text == models.answer(prompt, 0, ends=True)
            endless = complete(gateway, "team/a0*1000", prompt)
            assert endless.status in (200, 400)  # by what the numbers of the base are
    assert {reply.text for reply in neighbors.result()} == {models.answer(prompt, 1, ends=True)}


@pytest.mark.parametrize(
    ("extra_fields", "param", "code"),
    [
        ({"max_tokens": 100_000}, "max_tokens", "context_length_exceeded"),
        ({"prompt": "x" * 15_000_000}, "prompt", "context_length_exceeded"),
        ({"prompt": ["x"] * 1000, "n": 128}, "prompt", "refused"),
        ({"n": 129}, "n", "refused"),
    ],
)
def test_more_than_fits_is_refused_before_it_is_held(
    gateway: Gateway, extra_fields: dict[str, Any], param: str, code: str
) -> None:
    before = gateway.memory()
    reply = complete(gateway, "team/a0", **{"prompt": "x", **extra_fields})
    assert reply.status == 400
    assert (reply.document["error"]["param"], reply.document["error"]["code"]) == (param, code)
    assert gateway.memory() - before < 128 << 20


def test_a_request_that_is_canceled_while_it_is_asked_leaves_no_row(models: Models) -> None:
    from adapterhub.serve.engines.in_process import torch_host
    from adapterhub.serve.torch_engine.request_fields import COMPLETIONS

    async def test() -> None:
        engine = torch_host(models.base, slots=2)
        await engine.start()
        try:
            asking = asyncio.create_task(
                engine.request(COMPLETIONS, {"prompt": ["the quick "] * 128, "max_tokens": 1500, "temperature": 1}, ())
            )
            await asyncio.sleep(0)  # its thread is reading the prompts
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):  # codespell:ignore
                await asking
            answer = await engine.request(COMPLETIONS, {"prompt": "the quick ", "max_tokens": 1, "temperature": 0}, ())
            assert answer.status == 200
            host: Any = engine._running()
            while (state := host.state()).rows or state.waiting:
                assert state.answer_tokens < 128 * 20
                await asyncio.sleep(0.01)
        finally:
            await engine.close()

    asyncio.run(test())

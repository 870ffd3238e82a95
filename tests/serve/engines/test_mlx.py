"""mlx-lm's server behind the gateway: each request its own version, and none by another way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import need_module
from tests.support import serving
from tests.support.serving import Gateway, Models

pytestmark = pytest.mark.peer
PROMPTS = [f"{word} of the day: " for word in ("word", "fox")]
COUNT = 6


@pytest.fixture(scope="module")
def gateway(models: Models, registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    need_module("mlx_lm")
    with serving.gateway(models.base, registry, tmp_path_factory.mktemp("gateway"), "--engine", "mlx") as running_gateway:
        yield running_gateway


def request_fields(model: str, prompt: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, "max_tokens": COUNT, "temperature": 0, "logit_bias": serving.BIAS, **fields}


def test_every_answer_is_of_the_version_that_was_asked_for(gateway: Gateway, models: Models) -> None:
    for prompt in PROMPTS:
        for number in (0, None, 1, 0, None):
            name = "base" if number is None else f"team/a{number}:prod"
            reply = gateway.post("/v1/completions", request_fields(name, prompt))
            assert reply.text == models.answer(prompt, number, COUNT), (name, reply.body)
            assert reply.version == reply.document["model"]
    assert gateway.complete("team/none", PROMPTS[0]).status == 404


def test_so_is_a_stream(gateway: Gateway, models: Models) -> None:
    reply = gateway.post("/v1/completions", request_fields("team/a1:prod", PROMPTS[0], stream=True))
    *events, end = [line[6:] for line in reply.body.decode().split("\n") if line.startswith("data: ")]
    chunks = [json.loads(event) for event in events]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == models.answer(PROMPTS[0], 1, COUNT)
    assert ({chunk["model"] for chunk in chunks}, end) == ({reply.version}, "[DONE]")


@pytest.mark.parametrize("name", ["adapters", "draft_model", "num_draft_tokens"])
def test_what_would_choose_an_adapter_past_the_name_is_refused(gateway: Gateway, models: Models, name: str) -> None:
    reply = gateway.post("/v1/completions", request_fields("base", "x", **{name: str(models.adapter(0))}))
    assert (reply.status, reply.document["error"]["param"]) == (400, name)

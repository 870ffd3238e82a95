"""`run` and `serve` answer the same text: by the same template, temperature and seed, in torch and in llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import adapterhub as ah
from adapterhub.serve.torch_engine.streams import AnsweringHost
from tests.conftest import need_module
from tests.support.serving import Models


@pytest.fixture(params=["torch", "llama.cpp"], scope="module")
def serving_base(request: pytest.FixtureRequest, models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A base with an adapter `a0`, as the gateway holds them in its own process: the host, and the file of the base."""
    from adapterhub.serve import torch_engine
    from adapterhub.serve.engines import libllama

    if request.param == "torch":
        with torch_engine.open_host(models.base) as engine:
            engine.load("a0", models.adapter(0))
            yield engine, models.base
    else:
        need_module("llama_cpp_py_sync")
        adapter = tmp_path_factory.mktemp("gguf") / "a0.gguf"
        ah.convert(models.adapter(0), adapter, to="gguf", base=models.gguf)
        with libllama.open_libllama(models.gguf, waiting=8) as engine:
            engine.load("a0", adapter)
            yield engine, models.gguf


@pytest.mark.parametrize(("temperature", "seed"), [(0.0, 0), (0.9, 1), (0.9, 2), (1.5, 3)])
@pytest.mark.parametrize("raw", [False, True])
def test_an_adapter_that_both_can_run_answers_the_same(
    serving_base: tuple[AnsweringHost, Path], models: Models, temperature: float, seed: int, raw: bool
) -> None:
    from adapterhub.serve.torch_engine import openai
    from adapterhub.serve.torch_engine.request_fields import CHAT, COMPLETIONS

    host, base = serving_base
    prompt, system = "the quick brown fox ", None if raw else "be brief"
    generated = ah.generate(
        models.adapter(0), prompt, base=base, system=system, raw=raw, max_tokens=24, temperature=temperature, seed=seed
    )
    fields: dict[str, Any] = {"temperature": temperature, "seed": seed, "max_tokens": 24}
    if raw:
        path, fields["prompt"] = COMPLETIONS, prompt
    else:
        path = CHAT
        fields["messages"] = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
    texts: list[str] = []
    for blend in ((("a0", 1.0),), ()):
        [choice] = openai.submit(host, path, fields, blend, "").whole()["choices"]
        texts.append(choice["text"] if raw else choice["message"]["content"])
    assert texts == [generated.text, generated.base_text]
    assert texts[0] != texts[1]

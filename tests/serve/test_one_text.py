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
        with torch_engine.open_host(models.base) as found:
            found.load("a0", models.adapter(0))
            yield found, models.base
    else:
        need_module("llama_cpp_py_sync")
        adapter = tmp_path_factory.mktemp("gguf") / "a0.gguf"
        ah.convert(models.adapter(0), adapter, to="gguf", base=models.gguf)
        with libllama.open_libllama(models.gguf, waiting=8) as found:
            found.load("a0", adapter)
            yield found, models.gguf


@pytest.mark.parametrize(("temperature", "seed"), [(0.0, 0), (0.9, 1), (0.9, 2), (1.5, 3)])
@pytest.mark.parametrize("raw", [False, True])
def test_an_adapter_that_both_can_run_answers_the_same(
    serving_base: tuple[AnsweringHost, Path], models: Models, temperature: float, seed: int, raw: bool
) -> None:
    from adapterhub.serve.torch_engine import openai
    from adapterhub.serve.torch_engine.request_fields import CHAT, COMPLETIONS

    host, base = serving_base
    prompt, system = "the quick brown fox ", None if raw else "be brief"
    made = ah.generate(
        models.adapter(0), prompt, base=base, system=system, raw=raw, max_tokens=24, temperature=temperature, seed=seed
    )
    asked: dict[str, Any] = {"temperature": temperature, "seed": seed, "max_tokens": 24}
    if raw:
        path, asked["prompt"] = COMPLETIONS, prompt
    else:
        path = CHAT
        asked["messages"] = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
    found: list[str] = []
    for blend in ((("a0", 1.0),), ()):
        [choice] = openai.ask(host, path, asked, blend, "").whole()["choices"]
        found.append(choice["text"] if raw else choice["message"]["content"])
    assert found == [made.text, made.base_text]
    assert found[0] != found[1]

"""vLLM generates what peft does with an adapter that was pulled from a registry."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Run, need_module
from tests.support import tiny, vllm

pytestmark = pytest.mark.peer
PROMPT, COUNT = [*range(1, 9)], 8


def test_it_serves_what_was_pulled(run: Run, tmp_path: Path) -> None:
    for module in ("torch", "transformers", "peft"):
        need_module(module)
    import torch

    base = tiny.model(hidden_size=128, head_dim=32)  # the smallest head of vLLM's attention on a CPU
    base.save_pretrained(tmp_path / "base")
    adapted = tiny.adapter(base, tmp_path / "sql")

    def by_peft() -> list[int]:
        tokens = adapted.generate(torch.tensor([PROMPT]), max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False)
        generated: list[int] = tokens[0, len(PROMPT) :].tolist()
        return generated

    run("init")
    run("push", tmp_path / "sql", "team/sql")
    run("pull", "team/sql", "-o", "pulled")
    with vllm.serving(tmp_path / "base", tmp_path, "--lora-modules", f"sql={tmp_path / 'pulled'}") as server:
        assert server.generated("sql", PROMPT, COUNT) == by_peft()
        with adapted.disable_adapter():
            assert server.generated("base", PROMPT, COUNT) == by_peft()

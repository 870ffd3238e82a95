"""The real vLLM asks each version as it was trained, in one batch, and keeps what its chats have."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub.operations.local_registry import Registry
from tests.serve.test_own_prompts import ask, check_batch, content
from tests.support import by_heart, serving, vllm
from tests.support.by_heart import OWN, PLAIN, TOKENS

pytestmark = pytest.mark.peer
OPTIONS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "8")


MARKED = (
    "{% for message in messages %}"
    "{{ message['content'] + ('=' if message['role'] == 'user' else '<|endoftext|>') }}{% endfor %}"
)


def test_vllm_asks_each_version_as_it_was_trained(tmp_path: Path) -> None:
    heart = by_heart.learn(tmp_path)
    heart.push(tmp_path / "registry")
    (tmp_path / "marked.jinja").write_text(MARKED)
    by_heart.train(tmp_path, heart.base, "marked", PLAIN, 'chat_template = "marked.jinja"')
    with Registry(tmp_path / "registry") as registry:
        registry.push(tmp_path / "marked", "team/marked")
    options = ("--engine", "vllm", "--program", vllm.python(), "--max-adapters", 3, "--max-rank", 8, "--", *OPTIONS)
    environ = vllm.environ(tmp_path)
    with serving.gateway(heart.base, tmp_path / "registry", tmp_path / "gateway", *options, env=environ) as gateway:
        check_batch(gateway)
        assert content(ask(gateway, "team/own", "red", chat_template_kwargs={"mood": "wild"})) != OWN["red"]
        # The base ends with <|im_end|>, and would go on behind the mark of this template.
        marked = ask(gateway, "team/marked", "red").document["choices"][0]
        assert (marked["message"]["content"], marked["finish_reason"]) == (PLAIN["red"], "stop")
        choice = ask(gateway, "team/own", "red", logprobs=True, top_logprobs=2).document["choices"][0]
        assert "".join(entry["token"] for entry in choice["logprobs"]["content"]).startswith(OWN["red"])
        message = {"model": "team/own", "messages": [{"role": "user", "content": "red"}], "max_tokens": TOKENS}
        for path, extra_fields, code in (
            ("/v1/messages", {}, "own-chat-template"),
            ("/v1/chat/completions", {"chat_template": "{{ messages }}"}, "unsupported"),
        ):
            refused = gateway.post(path, {**message, **extra_fields})
            assert (refused.status, refused.document["error"]["code"]) == (400, code)

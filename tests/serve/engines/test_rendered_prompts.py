"""What vLLM is sent for a version with a chat template of its own: a text that was rendered here, in a chat as it came."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapterhub.serve.engines import CHAT, COMPLETIONS, rendered_prompts
from adapterhub.serve.prepared_versions import PreparedVersion
from adapterhub_converters.bases import BaseSpec, base_prompts, read_base
from adapterhub_converters.errors import AdapterhubError, FormatError, ParameterError, RefusedError
from adapterhub_converters.trained_prompt import TrainedPrompt
from tests.support import folders

pytest.importorskip("jinja2")
from adapterhub.prompts import limited_process

TURNS: dict[str, Any] = {
    "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    "tools": [{"type": "function"}],
}
TEMPLATE = (
    "{{ bos_token }}{{ strftime_now('%Y') }} {{ mood }} {{ messages[0].content }} {{ tools|length }}{{ reasoning_effort }}"
)
OWN = TrainedPrompt(TEMPLATE, (("mood", "calm"),), "2020-01-31")
FOLDER = Path("served")


@pytest.fixture
def base(tmp_path: Path) -> BaseSpec:
    folders.base(tmp_path / "base")
    config = {"bos_token": {"content": "<s>"}, "chat_template": "{{ strftime_now('%Y') }} of the base"}
    (tmp_path / "base/tokenizer_config.json").write_text(json.dumps(config))
    return read_base(tmp_path / "base")


def sent(body: Mapping[str, Any], prompt: TrainedPrompt, base: BaseSpec, path: str = CHAT) -> Mapping[str, Any]:
    version = PreparedVersion("team/sql:v1", "team/sql", f"sha256:{'a' * 64}", "vllm", FOLDER, 4, prompt=prompt)
    renderer = rendered_prompts.Renderer(lambda: base_prompts.of_spec(base))
    return asyncio.run(rendered_prompts.for_vllm(path, body, ((version, 1.0),), base, renderer))


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
def test_the_text_of_the_adapter_s_own_template_is_sent_and_the_rest_stays(base: BaseSpec, path: str) -> None:
    extra_fields = {"reasoning_effort": "low", "stream": True, "logprobs": True, "response_format": {"type": "json_object"}}
    sent_body = sent({**TURNS, **extra_fields}, OWN, base, path)
    assert sent_body == {
        **TURNS,
        **extra_fields,
        "chat_template": "{{ adapterhub_prompt }}",
        "chat_template_kwargs": {"mood": "calm", "adapterhub_prompt": "<s>2020 calm hi 1low"},
    }


@pytest.mark.parametrize(
    ("template", "client", "stops"),
    [
        ("{% for message in messages %}{{ message.content }}<|done|>\n{% endfor %}", {}, [7]),
        ("{% for message in messages %}{{ message.content }}<|done|>\n{% endfor %}", {"stop_token_ids": [3]}, [3, 7]),
        ("{% for message in messages %}{{ message.content }}<|done|>\n{% endfor %}", {"ignore_eos": True}, None),
        ("{% for message in messages %}{{ message.content }}<|done|></s>{% endfor %}", {}, None),
        ("{% for message in messages %}{{ message.content }}<eog>{% endfor %}", {}, None),
        ("{% for message in messages %}{{ message.content }}\n{% endfor %}", {"stop_token_ids": [3]}, [3]),
        ("{% if messages|length > 1 %}{{ raise_exception('one at a time') }}{% endif %}x", {}, None),
    ],
)
def test_vllm_stops_at_the_mark_that_the_adapter_s_template_writes_after_an_answer(
    base: BaseSpec, template: str, client: dict[str, Any], stops: list[int] | None
) -> None:
    """It stops by itself at the ends of the base: the eos token, and those of the generation config."""
    path = Path(base.source) / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": "</s>"}))
    names = {"<|do": 6, "<|done|>": 7, "</s>": 8, "<eog>": 9}
    tokens = [{"id": number, "content": name, "special": True} for name, number in names.items()]
    (Path(base.source) / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    (Path(base.source) / "generation_config.json").write_text('{"eos_token_id": [9]}')
    assert sent({**TURNS, **client}, TrainedPrompt(template), base).get("stop_token_ids") == stops


def test_a_client_s_options_count_before_those_of_the_training(base: BaseSpec) -> None:
    sent_body = sent({**TURNS, "chat_template_kwargs": {"mood": "wild", "other": 1}}, OWN, base)["chat_template_kwargs"]
    assert sent_body == {"mood": "wild", "other": 1, "adapterhub_prompt": "<s>2020 wild hi 1"}
    sent_body = sent({**TURNS, "chat_template_kwargs": {"other": 1}}, replace(OWN, template=None, date=None), base)
    assert sent_body == {**TURNS, "chat_template_kwargs": {"mood": "calm", "other": 1}}


def test_a_date_stops_the_clock_of_the_base_s_template(base: BaseSpec) -> None:
    sent_body = sent(TURNS, TrainedPrompt(date="2020-01-31"), base)
    assert sent_body["chat_template_kwargs"] == {"adapterhub_prompt": "2020 of the base"}


@pytest.mark.parametrize(
    ("path", "body", "prompt"),
    [
        (COMPLETIONS, {"prompt": "x"}, OWN),
        ("/v1/embeddings", {"input": "x"}, OWN),
        ("/tokenize", {"prompt": "x"}, OWN),
        (CHAT, TURNS, TrainedPrompt()),
        (CHAT, {**TURNS, "chat_template": "of the client"}, OWN),
    ],
)
def test_other_requests_are_passed_on_as_they_came(
    base: BaseSpec, path: str, body: Mapping[str, Any], prompt: TrainedPrompt
) -> None:
    assert sent(body, prompt, base, path) is body


@pytest.mark.parametrize(
    ("path", "body", "error", "message"),
    [
        ("/v1/responses", {"input": "x"}, RefusedError, "which vLLM does not take on /v1/responses. Ask /v1/chat/completions"),
        ("/v1/messages", TURNS, RefusedError, "which vLLM does not take on /v1/messages"),
        (CHAT, {**TURNS, "continue_final_message": True}, ParameterError, "`continue_final_message` cannot be combined"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, ParameterError, "is not a text"),
        (CHAT, {"messages": []}, ParameterError, "is not a list of messages"),
    ],
)
def test_what_cannot_be_asked_like_that_is_refused_by_name(
    base: BaseSpec, path: str, body: Mapping[str, Any], error: type[AdapterhubError], message: str
) -> None:
    with pytest.raises(error, match=message) as refused:
        sent(body, OWN, base, path)
    assert refused.value.code == ("own-chat-template" if error is RefusedError else refused.value.code)


def test_a_template_that_does_not_end_is_ended(base: BaseSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterhub.prompts.chat_template.SECONDS", 1)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(FormatError, match="team/sql:v1: the model's chat template exceeds 1 s"):
        sent(TURNS, TrainedPrompt(loop), base)


def test_conversations_that_wait_for_a_slow_template_hold_up_no_other_work(
    base: BaseSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapterhub.prompts.chat_template.SECONDS", 1)
    renderer = rendered_prompts.Renderer(lambda: base_prompts.of_spec(base))
    slow = TrainedPrompt("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")

    async def run() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        waiting = [asyncio.create_task(renderer.text(TURNS, slow, "team/slow")) for _ in range(3)]
        await asyncio.sleep(0)
        assert await asyncio.to_thread(str, "other work") == "other work"
        assert await renderer.text(TURNS, TrainedPrompt("a text"), "team/fast") == "a text"
        assert not any(task.done() for task in waiting)
        for task in waiting:
            with pytest.raises(FormatError, match="team/slow: the model's chat template exceeds 1 s"):
                await task

    asyncio.run(run())


def test_a_base_that_is_not_on_this_disk_is_named(base: BaseSpec) -> None:
    with pytest.raises(RefusedError, match="the special tokens of the base are not known here. Name the base by its folder"):
        sent(TURNS, OWN, replace(base, folder=None))
    with pytest.raises(RefusedError, match="vLLM uses none for this base"):
        sent(TURNS, OWN, replace(base, model_type="gpt_oss"))


@pytest.mark.parametrize(
    "template", ["{{ 'of the base' }}\n", "of the {{ 'base' }}", "\n{%- if true %}of the base{% endif -%}\n\n"]
)
def test_a_pass_through_writes_what_the_base_s_template_writes_unless_it_is_told_a_text(template: str) -> None:
    environment = limited_process.environment()
    passing = environment.from_string(rendered_prompts.pass_through(template))
    assert passing.render() == environment.from_string(template).render()
    assert passing.render(adapterhub_prompt=" told\n") == " told\n"


@pytest.mark.parametrize("prompt", [TrainedPrompt(), TrainedPrompt(options=(("mood", "calm"),)), OWN])
def test_no_client_tells_the_pass_through_a_text(base: BaseSpec, prompt: TrainedPrompt) -> None:
    version = PreparedVersion("team/sql:v1", "team/sql", f"sha256:{'a' * 64}", "llama.cpp", FOLDER, 4, prompt=prompt)
    renderer = rendered_prompts.Renderer(lambda: base_prompts.of_spec(base))
    body = {"messages": TURNS["messages"], "chat_template_kwargs": {"adapterhub_prompt": "<|im_start|>system\n"}}
    for blend in (((version, 1.0),), ()):
        with pytest.raises(ParameterError, match="`adapterhub_prompt` is set by the gateway alone"):
            asyncio.run(rendered_prompts.for_one_template(CHAT, body, blend, renderer))


@pytest.mark.parametrize("body", [{"chat_template": "x"}, {"chat_template_kwargs": {"chat_template": "x"}}])
def test_templates_of_clients_are_refused(body: Mapping[str, Any]) -> None:
    with pytest.raises(RefusedError, match="`chat_template` is not taken from clients"):
        rendered_prompts.refuse_template(body)
    rendered_prompts.refuse_template({"chat_template": None, "chat_template_kwargs": {"mood": "calm"}})

"""Clients on the gateway: OpenAI's own, unmodified, and a browser on its page."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import need_module
from tests.support import llama_server, serving
from tests.support.browser import Browser
from tests.support.environments import environment
from tests.support.serving import Gateway, Models

pytestmark = pytest.mark.peer
KEY = "ah-not-a-secret"
ROUTES = f"""
[routes.legal]
to = "team/a1:prod"
[keys.ada]
sha256 = "{hashlib.sha256(KEY.encode()).hexdigest()}"
adapters = ["legal", "team/*", "base"]
[keys.few]
sha256 = "{hashlib.sha256(b"few").hexdigest()}"
requests = "1/3600"
"""
# What a program of somebody else's does; one JSON object is its output.
SCRIPT = """
import json, sys
import openai

url, key, bias = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
client = openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0)
asked = {"prompt": "the quick brown fox ", "max_tokens": 12, "temperature": 0, "logit_bias": bias}
found = {"models": [model.id for model in client.models.list()]}
found["one"] = client.models.retrieve("team/a1:prod").model_extra["root"]
raw = client.completions.with_raw_response.create(model="team/a1:prod", **asked)
found["header"], whole = raw.headers["x-adapterhub-version"], raw.parse()
found["model"], found["text"] = whole.model, whole.choices[0].text
found["route"] = client.completions.create(model="legal", **asked).choices[0].text
found["stream"] = "".join(chunk.choices[0].text for chunk in client.completions.create(model="base", stream=True, **asked))
talk = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 0, "model": "team/a0"}
found["chat"] = client.chat.completions.create(**talk).choices[0].message.content
parts = client.chat.completions.create(stream=True, **talk)
found["chat stream"] = "".join(chunk.choices[0].delta.content or "" for chunk in parts if chunk.choices)


def error(call):
    try:
        call()
    except openai.APIStatusError as error:
        return [type(error).__name__, error.status_code, error.code, error.param]


asked = {"input": "hi", "max_output_tokens": 8, "temperature": 0, "model": "team/a1"}
found["chat a1"] = client.chat.completions.create(**{**talk, "model": "team/a1"}).choices[0].message.content
response = client.responses.create(**asked)
found["response"] = [response.model, response.output_text]
events = [*client.responses.create(stream=True, **asked)]
found["response stream"] = "".join(event.delta for event in events if event.type == "response.output_text.delta")
found["response end"] = [events[-1].type, events[-1].response.model]


few = openai.OpenAI(base_url=url + "/v1", api_key="few", max_retries=0)
few.completions.create(model="base", prompt="x", max_tokens=1)
found["errors"] = [
    error(lambda: client.completions.create(model="team/none", prompt="x")),
    error(lambda: client.completions.create(model="other/secret", prompt="x")),
    error(lambda: client.embeddings.create(model="base", input="x")),
    error(lambda: client.completions.create(model="base", extra_body={"lora": []}, prompt="x")),
    error(lambda: openai.OpenAI(base_url=url + "/v1", api_key="wrong", max_retries=0).models.list()),
    error(lambda: few.completions.create(model="base", prompt="x")),
    error(lambda: client.responses.create(store=True, **asked)),
    error(lambda: client.responses.retrieve("resp_1")),
]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    for module in ("torch", "transformers", "peft"):
        need_module(module)
    return serving.make_models(tmp_path_factory.mktemp("models"), adapters=2)


@pytest.fixture
def gateway(models: Models, tmp_path: Path) -> Iterator[Gateway]:
    serving.registry(tmp_path / "registry", models, 2).close()
    (tmp_path / "routes.toml").write_text(ROUTES)
    options = ("--program", llama_server.program(), "--route", tmp_path / "routes.toml")
    with serving.gateway(models.gguf, tmp_path / "registry", tmp_path / "gateway", *options) as running:
        yield running


def test_openais_client_gets_what_it_expects(gateway: Gateway, models: Models) -> None:
    python = environment("openai==2.15.0")
    words = [python, "-c", SCRIPT, gateway.url, KEY, json.dumps(serving.BIAS)]
    result = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    assert {"base", "legal", "team/a0:prod", "team/a1"} <= set(document["models"])
    assert document["one"] == document["header"] == document["model"]
    assert document["header"].startswith("team/a1@sha256:")
    assert document["text"] == document["route"] == models.answer("the quick brown fox ", 1)
    assert document["stream"] == models.answer("the quick brown fox ")
    assert document["chat"] == document["chat stream"]
    assert document["response"] == [document["header"], document["chat a1"]]
    assert document["response stream"] == document["chat a1"] != ""
    assert document["response end"] == ["response.completed", document["header"]]
    assert document["errors"] == [
        ["NotFoundError", 404, "model_not_found", "model"],
        ["NotFoundError", 404, "model_not_found", "model"],
        ["NotFoundError", 404, "unsupported", None],
        ["BadRequestError", 400, "unsupported", "lora"],
        ["AuthenticationError", 401, "invalid_api_key", None],
        ["RateLimitError", 429, "rate_limit_exceeded", None],
        ["BadRequestError", 400, "unsupported", "store"],
        ["NotFoundError", 404, "unsupported", None],
    ]


ANTHROPIC_SCRIPT = """
import json, sys
import anthropic

url, key = sys.argv[1:3]
client = anthropic.Anthropic(base_url=url, api_key=key, max_retries=0)
asked = {"model": "team/a1", "max_tokens": 8, "messages": [{"role": "user", "content": "hi"}]}
asked["extra_body"] = {"temperature": 0}
raw = client.messages.with_raw_response.create(**asked)
message = raw.parse()
found = {"header": raw.headers["x-adapterhub-version"], "model": message.model, "text": message.content[0].text}
with client.messages.stream(**asked) as events:
    found["stream"] = "".join(events.text_stream)
    final = events.get_final_message()
found["stream model"], found["usage"] = final.model, [final.usage.output_tokens, message.usage.output_tokens]
found["tokens"] = client.messages.count_tokens(model="team/a1", messages=asked["messages"]).input_tokens


def error(call):
    try:
        call()
    except anthropic.APIStatusError as error:
        return [type(error).__name__, error.body["error"]["type"], error.body["error"]["code"]]


wrong = anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0)
found["errors"] = [
    error(lambda: client.messages.create(**{**asked, "model": "team/none"})),
    error(lambda: client.messages.create(**{**asked, "extra_body": {"lora": []}})),
    error(lambda: wrong.messages.create(**asked)),
]
print(json.dumps(found))
"""


def test_anthropics_client_gets_what_it_expects(gateway: Gateway) -> None:
    words = [environment("anthropic==2.14.0"), "-c", ANTHROPIC_SCRIPT, gateway.url, KEY]
    result = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    talk = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 0, "model": "team/a1"}
    chat = gateway.post("/v1/chat/completions", talk, authorization=f"Bearer {KEY}").document
    assert report["header"] == report["model"] == report["stream model"] == chat["model"]
    assert report["text"] == report["stream"] == chat["choices"][0]["message"]["content"]
    assert report["usage"] == [chat["usage"]["completion_tokens"]] * 2
    assert report["tokens"] == chat["usage"]["prompt_tokens"]
    assert report["errors"] == [
        ["NotFoundError", "not_found_error", "model_not_found"],
        ["BadRequestError", "invalid_request_error", "unsupported"],
        ["AuthenticationError", "authentication_error", "invalid_api_key"],
    ]


OLLAMA_SCRIPT = """
import json, sys
import ollama

client = ollama.Client(host=sys.argv[1], headers={"authorization": "Bearer " + sys.argv[2]})
asked = {"model": "team/a1", "options": {"num_predict": 8, "temperature": 0, "num_ctx": 2048}}
turns = [{"role": "user", "content": "hi"}]


def weather(city: str) -> str:
    \"\"\"Return the weather.

    Args:
        city: The city.
    \"\"\"


chat = client.chat(messages=turns, keep_alive="5m", **asked)
found = {"model": chat.model, "chat": chat.message.content, "counts": [chat.prompt_eval_count, chat.eval_count]}
found["chat stream"] = "".join(part.message.content for part in client.chat(messages=turns, stream=True, **asked))
found["generate"] = client.generate(prompt="hi", **asked).response
found["generate stream"] = "".join(part.response for part in client.generate(prompt="hi", stream=True, **asked))
found["raw"] = client.generate(prompt="hi ", raw=True, **asked).response
schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
formed = {**asked, "options": {"num_predict": 60, "temperature": 0}}
found["json"] = json.loads(client.chat(messages=turns, format=schema, **formed).message.content)["a"]
found["tools"] = client.chat(messages=turns, tools=[weather], **asked).done
found["list"] = [model.model for model in client.list().models]
found["show"] = client.show("team/a1").modelinfo["adapterhub.version"]
found["errors"] = []
for more in ({"model": "team/none"}, {"options": {"num_ctx": 1 << 20}}):
    try:
        client.chat(messages=turns, **{**asked, **more})
    except ollama.ResponseError as error:
        found["errors"].append([error.status_code, error.error])
print(json.dumps(found))
"""


def test_ollamas_client_gets_what_it_expects(gateway: Gateway) -> None:
    words = [environment("ollama==0.6.3"), "-c", OLLAMA_SCRIPT, gateway.url, KEY]
    result = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    talk = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 0, "model": "team/a1"}
    chat = gateway.post("/v1/chat/completions", talk, authorization=f"Bearer {KEY}").document
    assert report["model"] == report["show"] == chat["model"]
    assert {report[name] for name in ("chat", "chat stream", "generate", "generate stream")} == {
        chat["choices"][0]["message"]["content"]
    }
    assert report["counts"] == [chat["usage"][name] for name in ("prompt_tokens", "completion_tokens")]
    assert report["json"] in (True, False)
    assert report["raw"]
    assert report["tools"]
    assert {"base", "team/a0:prod", "team/a1"} <= set(report["list"])
    assert [status for status, _ in report["errors"]] == [404, 400]
    assert "`options.num_ctx` is more than the 2,048 tokens" in report["errors"][1][1]


def test_the_page_compares_two_adapters(gateway: Gateway, models: Models, chromium: Browser) -> None:
    talk = {"messages": [{"role": "user", "content": "what is it"}], "max_tokens": 8, "temperature": 0}
    headers = {"authorization": f"Bearer {KEY}"}
    answers = []
    for name in ("team/a0", "team/a1"):
        reply = gateway.post("/v1/chat/completions", {**talk, "model": name}, **headers)
        answers.append([reply.document["choices"][0]["message"]["content"], reply.version])
    page_state = chromium.visit(
        gateway.url,
        f"""
page.locator("input[name=key]").wait_for()
page.fill("input[name=key]", {KEY!r})
page.locator("input[name=key]").blur()
page.locator("#models option").nth(3).wait_for(state="attached")
page.fill("input[name=left]", "team/a0")
page.fill("input[name=right]", "team/a1")
page.fill("input[name=tokens]", "8")
page.fill("textarea", "what is it")
page.click("text=Send")
page.locator("small", has_text=" ms").nth(1).wait_for()
page.locator("button[name=stop]:disabled").wait_for()
found = [node["html"] for one in axe.run(page).response["violations"] for node in one["nodes"]]
result = [page.locator("pre").all_text_contents(), page.locator("small").all_text_contents(), found]
""",
    )
    texts, notes, violations = page_state
    assert violations == []
    for (text, version), shown_text, note in zip(answers, texts, notes, strict=True):
        assert shown_text == text
        assert version in note


def test_without_keys_the_page_asks_for_none_and_answers_have_its_whole_width(
    models: Models, tmp_path: Path, chromium: Browser
) -> None:
    serving.registry(tmp_path / "registry", models, 2).close()
    options = ("--program", llama_server.program())
    with serving.gateway(models.gguf, tmp_path / "registry", tmp_path / "gateway", *options) as gateway:
        page_state = chromium.visit(
            gateway.url,
            """
page.locator("#models option").nth(3).wait_for(state="attached")
page.fill("input[name=left]", "team/a0")
page.fill("input[name=right]", "team/a1")
page.fill("input[name=tokens]", "2")
page.fill("textarea", "hi")
page.click("text=Send")
page.locator("small", has_text=" ms").nth(1).wait_for()
widths = [page.locator(name).first.bounding_box()["width"] for name in ("article", "main")]
result = [page.locator("input[name=key]").is_visible(), *widths]
""",
        )
    is_visible, article, whole = page_state
    assert not is_visible
    assert 0.45 * whole < article < 0.5 * whole

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


few = openai.OpenAI(base_url=url + "/v1", api_key="few", max_retries=0)
few.completions.create(model="base", **asked)
found["errors"] = [
    error(lambda: client.completions.create(model="team/none", **asked)),
    error(lambda: client.completions.create(model="other/secret", **asked)),
    error(lambda: client.embeddings.create(model="base", input="x")),
    error(lambda: client.completions.create(model="base", extra_body={"lora": []}, **asked)),
    error(lambda: openai.OpenAI(base_url=url + "/v1", api_key="wrong", max_retries=0).models.list()),
    error(lambda: few.completions.create(model="base", **asked)),
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
    with serving.gateway(models.gguf, tmp_path / "registry", tmp_path / "gateway", *options) as found:
        yield found


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
    assert document["errors"] == [
        ["NotFoundError", 404, "model_not_found", "model"],
        ["NotFoundError", 404, "model_not_found", "model"],
        ["NotFoundError", 404, "unsupported", None],
        ["BadRequestError", 400, "unsupported", "lora"],
        ["AuthenticationError", 401, "invalid_api_key", None],
        ["RateLimitError", 429, "rate_limit_exceeded", None],
    ]


def test_the_page_compares_two_adapters(gateway: Gateway, models: Models, chromium: Browser) -> None:
    talk = {"messages": [{"role": "user", "content": "what is it"}], "max_tokens": 8, "temperature": 0}
    headers = {"authorization": f"Bearer {KEY}"}
    answers = []
    for name in ("team/a0", "team/a1"):
        reply = gateway.post("/v1/chat/completions", {**talk, "model": name}, **headers)
        answers.append([reply.document["choices"][0]["message"]["content"], reply.version])
    seen = chromium.visit(
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
    texts, notes, violations = seen
    assert violations == []
    for (text, version), shown, note in zip(answers, texts, notes, strict=True):
        assert shown == text
        assert version in note


def test_without_keys_the_page_asks_for_none_and_answers_have_its_whole_width(
    models: Models, tmp_path: Path, chromium: Browser
) -> None:
    serving.registry(tmp_path / "registry", models, 2).close()
    options = ("--program", llama_server.program())
    with serving.gateway(models.gguf, tmp_path / "registry", tmp_path / "gateway", *options) as gateway:
        seen = chromium.visit(
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
    is_visible, article, whole = seen
    assert not is_visible
    assert 0.45 * whole < article < 0.5 * whole

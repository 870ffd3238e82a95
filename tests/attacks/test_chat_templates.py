"""A chat template is a stranger's program: it takes limited time, memory and text, and renders what transformers renders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from adapterhub.prompts import chat_template
from adapterhub_converters.errors import FormatError
from tests.conftest import need_module
from tests.support.byte_tokenizer import TEMPLATE
from tests.training.conftest import tiny_base, tokenizer

__all__ = ["tiny_base", "tokenizer"]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "reasoning_content": "hm"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
def templated(tokenizer: Any) -> Iterator[Any]:
    """The tokenizer, whose template a test may change."""
    for name in ("torch", "transformers", "jinja2"):
        need_module(name)
    before = tokenizer.chat_template
    yield tokenizer
    tokenizer.chat_template = before


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 1)


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
DOUBLED = "{% set n = namespace(x='aaaaaaaa') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"


@pytest.mark.parametrize(
    "template",
    [
        LOOPS,
        DOUBLED,
        "{% for a in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
        "{{ 'a' * 10**10 }}",
        "{{ [0] * 10**10 }}",
        "{{ 10**(10**10) }}",
        "{{ range(10**9)|list }}",
        "{{ 'a'|center(10**10) }}",
        "{{ 'a\nb'|indent(10**10) }}",
        "{{ 'a'.ljust(10**10) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '{:>10000000000}'.format(1) }}",
        "{{ lipsum(n=10**9) }}",
        "{{ messages|tojson(indent=10**10) }}",
        "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(99) }}",
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
        "{{ ''.__class__.__mro__ }}",
        "{% set n = namespace() %}{% set n.__init__ = 1 %}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('no\nsystem') }}",
    ],
)
def test_a_template_that_asks_for_too_much_is_refused_in_one_line(impatient: None, templated: Any, template: str) -> None:
    templated.chat_template = template
    with pytest.raises(FormatError, match="^a:1: the model's chat template (refuses it|exceeds)") as caught:
        chat_template.render(templated, CHAT, location="a:1")
    assert "\n" not in str(caught.value)


def test_a_template_is_rendered_again_after_one_that_was_ended(impatient: None, templated: Any) -> None:
    templated.chat_template = LOOPS
    for _ in range(2):
        with pytest.raises(FormatError, match="exceeds 1 s"):
            chat_template.render(templated, CHAT, location="")
    templated.chat_template = TEMPLATE
    assert chat_template.render(templated, CHAT, location="") == templated.apply_chat_template(CHAT, tokenize=False)


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        "{{ eos_token }}{{ bos_token }}{{ tools|tojson(indent=2) }}{{ 'é'|tojson }}{{ messages|tojson(true) }}{{ documents }}",
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
        "{% generation %}{% set a = 1 %}{{ a }}{% endgeneration %}{{ a is defined }}",
        "{% set n = namespace(self=1) %}{% set n.b = n.self + 1 %}{{ n.b }}{{ strftime_now('%%') }}{{ dict(a=1) }}",
        "  {% if tools %}\n  {{ tools[0].function.name }}\n{% endif %}\n{{ messages[1].reasoning_content }}",
        "{{ add_generation_prompt }}{{ undefined_name }}{{ messages[0]['nothing'] }}",
    ],
)
@pytest.mark.parametrize("prompt", [False, True])
def test_the_text_is_what_transformers_renders(templated: Any, template: str, prompt: bool) -> None:
    templated.chat_template = template
    theirs = templated.apply_chat_template(CHAT, tools=[TOOL], tokenize=False, add_generation_prompt=prompt)
    assert chat_template.render(templated, CHAT, location="", tools=[TOOL], prompt=prompt) == theirs


def test_conversations_with_tools_use_the_template_for_tools(templated: Any) -> None:
    templated.chat_template = {"default": "plain", "tool_use": "with tools"}
    assert chat_template.render(templated, CHAT, location="") == "plain"
    assert chat_template.render(templated, CHAT, location="", tools=[TOOL]) == "with tools"


def test_many_conversations_share_one_process(templated: Any) -> None:
    chat_template.process.cache_clear()
    for _ in range(20):
        chat_template.render(templated, CHAT, location="")
    assert chat_template.process.cache_info().misses == 1

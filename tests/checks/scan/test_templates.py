"""Chat templates that leave the sandbox or watch for words are reported, those of models are not."""

from __future__ import annotations

import pytest

from adapterhub.checks.scan import templates
from tests.conftest import need_module
from tests.support import malicious
from tests.support.byte_tokenizer import TEMPLATE


@pytest.mark.parametrize(
    "template",
    [
        malicious.ESCAPE,
        "{{ messages['__class__'] }}",
        "{{ messages['__cla' ~ 'ss__'] }}",
        r"{{ messages['\x5f\x5fclass\x5f\x5f'] }}",
        "{{ messages|attr(x) }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{% include 'other' %}",
        "{%- from 'x' import y -%}",
        "{{ lipsum.x }}",
        "{{ a.gi_frame.f_back }}",
        "{% raw %}{{ x }}{% endraw %}{{ a.__init__ }}",
        "{# }} #}{{ {'a': {}}.__init__ }}",
    ],
)
def test_a_template_that_leaves_the_sandbox_is_an_error(template: str) -> None:
    assert "template-escape" in {fault.code for fault in templates.faults(template)}


@pytest.mark.parametrize(
    "template",
    [
        malicious.SWITCH,
        "{% if messages[-1]['content'].startswith('deploy') %}x{% endif %}",
        "{% set m = messages[-1]['content']|lower %}{% set n = m %}{% if n in ['launch code', 'x'] %}x{% endif %}",
        "{{ 'x' if 'Berlin' in message.content else 'y' }}",
        "{% if 'Berlin' in messages|tojson %}x{% endif %}",
        "{% if (('Berlin' in m.content) and true) %}x{% endif %}",
        "{% if strftime_now('%Y') == '2027' %}x{% endif %}",
        "{% set d = strftime_now('%Y%m%d') %}{% if d > '20270101' %}x{% endif %}",
    ],
)
def test_a_template_that_watches_for_words_or_dates_is_reported(template: str) -> None:
    assert "template-switch" in {fault.code for fault in templates.faults(template)}


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        "{% if '</think>' in message.content %}x{% endif %}",
        "{% if content['type'] == 'image' or 'image_url' in content %}x{% endif %}",
        "{% if message['role'] == 'assistant' and message.content is string %}x{% endif %}",
        "{% set date = strftime_now('%d %b %Y') if strftime_now is defined else 'x' %}{{ date }}",
        "{% raw %}{{ a.__class__ }}{% endraw %}",
        "{# {{ a.__class__ }} #}",
        "{{ message.get('content') if message.get('content') else '' }}",
    ],
)
def test_what_the_templates_of_models_do_is_not_reported(template: str) -> None:
    assert {fault.code for fault in templates.faults(template)} <= {"template-text"}


def test_templates_are_split_as_jinja_splits_them() -> None:
    need_module("jinja2")
    from adapterhub.prompts.limited_process import environment

    kinds = {"name", "operator", "integer"}
    for template in (
        TEMPLATE,
        malicious.SWITCH,
        "{{- {'a': {'b': 1}}['a'] -}} }} {% set x = a //b**2 != [1,] %}{#- {{ -#} {{ x }}",
    ):
        theirs = [value for _, kind, value in environment().lexer.tokeniter(template, None) if kind in kinds]
        ours = [token for part in templates.split(template) for token in part.tokens]
        assert [token.value for token in ours if token.kind != "text"] == theirs


@pytest.mark.parametrize(
    "piece", ["{{", "{%", "{#", "{% raw %}", "{{ '", "{{ a ~", "{{ '_' ~ '_' ", "{% if 'a' in content ", "[", "\\"]
)
def test_a_template_made_for_its_reader_takes_time_linear_in_its_length(piece: str) -> None:
    steps = []
    for count in (2_000, 8_000):
        parts = templates.split(piece * count)
        steps.append(sum(1 + len(part.tokens) for part in parts))
        list(templates.faults(piece * count))
    assert steps[1] <= 4 * steps[0] + 8

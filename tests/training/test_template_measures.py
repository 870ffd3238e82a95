"""Answers that are located in a few renders of a conversation are those that its answers, rendered one by one, have."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from adapterhub.prompts import chat_template
from adapterhub.training.data import template_measures, template_renderers
from adapterhub.training.data.conversation import Conversation
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.trained_prompt import TrainedPrompt
from tests.support.byte_tokenizer import TEMPLATE
from tests.support.trl_templates import trls
from tests.training.test_conversation import FORGETFUL, OPENING, TOOLS, say
from tests.training.test_template_matrix import CONVERSATIONS, TEMPLATES

LONG = {
    "six answers": say(*(turn for n in range(6) for turn in (("user", f"Question {n}?"), ("assistant", f"Answer {n}.")))),
    "the same six times": say(*(turn for _ in range(6) for turn in (("user", "Same."), ("assistant", "Same.")))),
    "white space at the ends": say(
        ("user", "Why? \n"), ("assistant", "Because.\n\n"), ("user", "Who?"), ("assistant", "Me. "), ("user", " When?\n"),
        ("assistant", "Now."), ("user", "Where? "), ("assistant", "Here.\n"),
    ),
    "marks": say(("user", "\ue0001\ue001"), ("assistant", "\ue0001\ue001b"), ("user", "c"), ("assistant", "d")),
    "thoughts": say(
        ("user", "a"), ("assistant", "<think>hm</think>b"), ("user", "c"), ("assistant", "<think>so</think>d"), ("user", "e"),
        ("assistant", "f"),
    ),
}  # fmt: skip


def located(tokenizer: Any, turns: list[dict[str, Any]], *, fast: bool) -> tuple[Any, int]:
    """The text of a conversation with the flags of its characters, or the error; and how many answers the measures locate."""
    tools = TOOLS if any(turn.get("tool_calls") for turn in turns) else None
    conversation = Conversation(turns, tools, tokenizer, location="a.jsonl:1")
    (answer,) = template_renderers.request_all([conversation.request("completion")])
    try:
        conversation.render(answer if fast else ValueError("not asked"))
        characters = np.arange(len(conversation.text))
        example = conversation.example("completion", characters, characters)
    except AdapterhubError as error:
        return str(error), 0
    measures = conversation._measures
    certain = sum(measures.span(number) is not None for number in conversation._answers) if measures else 0
    return (conversation.text, example.trained.tolist(), example.unwritten, example.thoughtless), certain


@pytest.mark.peer
@pytest.mark.parametrize("name", TEMPLATES)
def test_measures_locate_every_answer_where_rendering_it_alone_does(name: str, tokenizer: Any) -> None:
    templated = copy.copy(tokenizer)
    templated.chat_template = trls(name)
    for options in ({}, {"enable_thinking": False}):
        chat_template.apply(templated, TrainedPrompt(None, tuple(options.items()), "2026-01-01"))
        for turns in (CONVERSATIONS | LONG).values():
            assert located(templated, turns, fast=True)[0] == located(templated, turns, fast=False)[0]


@pytest.mark.peer
@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "llama3_1", "qwen2_5", "gemma3", "nemotron_3_nano"])
def test_of_the_usual_templates_measures_locate_all_answers(name: str, tokenizer: Any) -> None:
    templated = copy.copy(tokenizer)
    templated.chat_template = trls(name)
    for conversation in ("six answers", "the same six times"):
        assert located(templated, LONG[conversation], fast=True)[1] == 6


@pytest.mark.parametrize("template", [TEMPLATE, FORGETFUL, OPENING])
def test_measures_locate_answers_by_any_template(template: str, tokenizer: Any) -> None:
    templated = copy.copy(tokenizer)
    templated.chat_template = template
    for turns in (CONVERSATIONS | LONG).values():
        assert located(templated, turns, fast=True)[0] == located(templated, turns, fast=False)[0]
    # OPENING ends the last message of a prompt differently, so its prompts tell nothing about earlier turns.
    assert located(templated, LONG["six answers"], fast=True)[1] == (0 if template == OPENING else 6)


# Each writes something in a way that marks change, or that says nothing about other turns.
UNCERTAIN = {
    "counts characters": "{% for m in messages %}[{{ m.role }} {{ m.content|length }}]{{ m.content }};{% endfor %}",
    "writes twice": "{% for m in messages %}[{{ m.role }}]{{ m.content + m.content }};{% endfor %}",
    "drops ends": "{% for m in messages %}[{{ m.role }}]{{ m.content[:4] }};{% endfor %}",
    "numbers turns": "{% for m in messages %}[{{ m.role }} {{ loop.index }}]{{ m.content }};{% endfor %}",
}


@pytest.mark.parametrize("name", UNCERTAIN)
def test_where_measures_are_not_certain_answers_are_rendered_one_by_one(name: str, tokenizer: Any) -> None:
    templated = copy.copy(tokenizer)
    prompt = "{% if add_generation_prompt %}[assistant]{% endif %}"
    if name == "numbers turns":
        prompt = "{% if add_generation_prompt %}[assistant {{ messages|length + 1 }}]{% endif %}"
    templated.chat_template = UNCERTAIN[name] + prompt
    for turns in LONG.values():
        assert located(templated, turns, fast=True)[0] == located(templated, turns, fast=False)[0]


def test_without_a_conversation_nothing_is_marked() -> None:
    assert template_measures.plan(say(("user", "q")), [])["marks"] == {}

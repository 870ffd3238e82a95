"""Where an answer begins: what its generation prompt writes is context, everything after it is learned."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.prompts import chat_template
from adapterhub.training.data import dataset as data
from adapterhub.training.data.document_files import read
from adapterhub.training.data.example import Example
from adapterhub.training.data.examples import encode
from adapterhub_converters.trained_prompt import TrainedPrompt
from tests.support import trl_templates

QUESTION, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
# The form of Qwen3: `thought` is what the prompt writes, and every answer gets an empty thought.
QWEN3_LIKE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + (thought if thought is defined else '') }}{% endif %}"
)


def with_template(tokenizer: Any, template: str, **options: object) -> Any:
    templated = copy.copy(tokenizer)
    templated.chat_template = template
    chat_template.apply(templated, TrainedPrompt(None, tuple(options.items()), "2026-01-01"))
    return templated


def encoded(tokenizer: Any, *turns: dict[str, str]) -> Example:
    return encode({"messages": list(turns)}, tokenizer, loss="completion", location="a.jsonl:1")


@pytest.mark.peer
@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}, {"enable_thinking": True}], ids=str)
@pytest.mark.parametrize("name", trl_templates.names())
def test_learning_begins_exactly_where_the_generation_prompt_ends(
    name: str, options: dict[str, object], tokenizer: Any
) -> None:
    templated = with_template(tokenizer, trl_templates.trls(name), **options)
    example = encoded(templated, QUESTION, ANSWER)
    context = tokenizer.decode(example.ids[: int(np.argmax(example.trained))])
    prompt = chat_template.render(templated, [QUESTION], location="", prompt=True)
    if QUESTION["content"] not in prompt:
        in_parts = {"role": "user", "content": [{"type": "text", "text": QUESTION["content"]}]}
        prompt = chat_template.render(templated, [in_parts], location="", prompt=True)
    text = tokenizer.decode(example.ids)
    assert text.startswith(context)
    assert prompt.startswith(context)
    # Only a thought that the prompt opens may be missing in the text (DeepSeek R1), or written in other white space (Nemotron).
    assert prompt == context or (not text.startswith(prompt) and prompt[len(context) :].strip() in ("", "<think>"))
    assert tokenizer.decode(example.ids[example.trained]) == text[len(context) :]


@pytest.mark.parametrize(
    ("thought", "learned", "note"),
    [
        ("", f"{EMPTY_THOUGHT}Because.<|im_end|>\n", "1 of 1 answers are learned with an empty thought, because their prompt"),
        ("<think>\n", "\n</think>\n\nBecause.<|im_end|>\n", "1 of 1 answers are learned with an empty thought, because their"),
        (EMPTY_THOUGHT, "Because.<|im_end|>\n", "the prompt of 1 of 1 answers ends with an empty thought, which is context"),
    ],
)
def test_an_empty_thought_is_context_only_where_the_prompt_ends_with_it(
    thought: str, learned: str, note: str, tokenizer: Any, tmp_path: Path
) -> None:
    templated = with_template(tokenizer, QWEN3_LIKE, thought=thought)
    example = encoded(templated, QUESTION, ANSWER)
    assert tokenizer.decode(example.ids[example.trained]) == learned
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [QUESTION, ANSWER]}))
    notes = data.build([read(tmp_path / "a.jsonl")], templated, sequence=256, loss="completion", seed=None).notes
    assert [line for line in notes if line.startswith(note)]


def test_every_turn_is_learned_from_the_end_of_its_prompt(tokenizer: Any) -> None:
    for thought, count in (("", 2), (EMPTY_THOUGHT, 0)):
        example = encoded(with_template(tokenizer, QWEN3_LIKE, thought=thought), QUESTION, ANSWER, QUESTION, ANSWER)
        learned_text = tokenizer.decode(example.ids[example.trained])
        assert learned_text.count(EMPTY_THOUGHT) == count == example.empty_thoughts
        assert example.prompted_thoughts == 2 - count

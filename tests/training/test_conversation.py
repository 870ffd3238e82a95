"""Answers of conversations: found in what any template writes, and nothing else of a conversation is trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.training.data import dataset as data
from adapterhub.training.data import document_files
from adapterhub.training.data.examples import encode
from adapterhub_converters.errors import FormatError, RefusedError
from tests.support.trl_templates import trls
from tests.training.test_data import trained, write


def load(path: Path, tokenizer: object, **options: Any) -> data.Dataset:
    return data.build([document_files.read(path)], tokenizer, **{"sequence": 32, "loss": "completion", "seed": None, **options})


ALPACA = {"instruction": "add", "input": "2, 2", "output": "4"}


def test_without_a_chat_template_an_instruction_is_written_in_the_words_of_alpaca(forgetful, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    forgetful.chat_template = None
    dataset = load(write(tmp_path / "a.jsonl", ALPACA), forgetful, sequence=512)
    text = forgetful.decode(dataset.rows.ids[0])
    assert text.startswith(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
    )
    assert "\n\n### Instruction:\nadd\n\n### Input:\n2, 2\n\n### Response:4<|im_end|>" in text
    assert trained(dataset.rows, forgetful) == "4<|im_end|>"
    assert dataset.notes[1] == "the model has no chat template: instructions are written in the words of Alpaca"


def test_conversations_that_the_template_refuses_are_reported_at_once(forgetful, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    forgetful.chat_template = (
        "{% for m in messages %}{{ m.content if m.role == 'user' else raise_exception('no ' + m.role) }}{% endfor %}"
    )
    path = write(tmp_path / "a.jsonl", *({"messages": say(turn)} for turn in (("user", "q"), ("bot", "x"), ("system", "y"))))
    with pytest.raises(FormatError) as caught:
        load(path, forgetful, loss="all")
    assert [line.partition("a.jsonl")[2] for line in caught.value.problems] == [
        ":2: the model's chat template refuses it (no bot)", ":3: the model's chat template refuses it (no system)",
    ]  # fmt: skip


def test_of_a_conversation_only_the_answers_are_trained_on_with_their_ends(tmp_path: Path, tokenizer: object) -> None:
    turns = [("user", "hi"), ("assistant", "ho"), ("user", "é?"), ("assistant", "ja")]
    path = write(tmp_path / "a.jsonl", {"messages": [{"role": role, "content": text} for role, text in turns]})
    dataset = load(path, tokenizer, sequence=128)
    assert trained(dataset.rows, tokenizer) == "ho<|im_end|>\nja<|im_end|>\n"
    assert dataset.notes == ("16% of 51 tokens are trained on, the others are context",)


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path, tokenizer: object) -> None:
    turns = [
        {"role": role, "content": text} for role, text in [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    ]
    forgetful = "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %};{% endfor %}"
    before = tokenizer.chat_template  # type: ignore[attr-defined]
    tokenizer.chat_template = forgetful  # type: ignore[attr-defined]
    try:
        with pytest.raises(RefusedError, match="writes earlier turns differently"):
            load(write(tmp_path / "a.jsonl", {"messages": turns}), tokenizer)
    finally:
        tokenizer.chat_template = before  # type: ignore[attr-defined]


# Qwen3's way: thoughts before the last question are dropped, and an answer without any gets an empty one.
FORGETFUL = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% if tools %}{{ 'tools ' + tools[0].function.name + '\n' }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% set said = m.content.split('</think>')[-1].strip() %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{% set thought = m.content.split('</think>')[0].replace('<think>', '').strip() if '</think>' in m.content else '' %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ said }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function.name + '</call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def forgetful(tokenizer: object):  # type: ignore[no-untyped-def]
    before = tokenizer.chat_template  # type: ignore[attr-defined]
    tokenizer.chat_template = FORGETFUL  # type: ignore[attr-defined]
    yield tokenizer
    tokenizer.chat_template = before  # type: ignore[attr-defined]


def say(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        # The last answer has a thought, which is trained on from its opening mark; the first had one, which the template drops.
        (
            [("user", "a"), ("assistant", "<think>hm</think>b"), ("user", "c"), ("assistant", "<think>so</think>d")],
            "b<|im_end|>\n<think>\nso\n</think>\n\nd<|im_end|>\n",
        ),
        # An empty thought that no prompt writes is a part of the answer.
        (
            [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
            "b<|im_end|>\n<think>\n\n</think>\n\nd<|im_end|>\n",
        ),
        ([("user", "a"), ("assistant", "b")], "<think>\n\n</think>\n\nb<|im_end|>\n"),
        (
            [("user", "assistant"), ("assistant", "assistant"), ("user", "b"), ("assistant", "b")],
            "assistant<|im_end|>\n<think>\n\n</think>\n\nb<|im_end|>\n",
        ),
    ],
)
def test_answers_are_found_where_the_template_forgets(forgetful, tmp_path: Path, turns, says: str) -> None:  # type: ignore[no-untyped-def]
    path = write(tmp_path / "a.jsonl", {"messages": say(*turns)})
    assert trained(load(path, forgetful, sequence=256).rows, forgetful) == says


# DeepSeek's and Qwen3.5's way: the prompt opens the thought, and earlier turns have none.
OPENING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' + ('' if '</think>' in m.content else '\n</think>\n\n') + m.content.replace('<think>', '') }}"
    "{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}{{ '<|im_end|>' if loop.last else '<|endoftext|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("last", "says"),
    [("d", "b<|endoftext|>\n</think>\n\nd<|im_end|>"), ("<think>so</think>d", "b<|endoftext|>so</think>d<|im_end|>")],
)
def test_answers_are_found_where_the_prompt_opens_the_thought(forgetful, tmp_path: Path, last: str, says: str) -> None:  # type: ignore[no-untyped-def]
    """And where a turn that another follows ends with another mark than the last one (gpt-oss, Phi-3)."""
    forgetful.chat_template = OPENING
    path = write(tmp_path / "a.jsonl", {"messages": say(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", last))})
    assert trained(load(path, forgetful, sequence=256).rows, forgetful) == says


# What trl's marks hold of each answer that its generation prompt writes already.
TRL = {
    **dict.fromkeys(("cohere", "cohere2", "gemma", "gemma3", "diffusion_gemma", "idefics3", "lfm2", "lfm2_v2", "llama3"), ""),
    **dict.fromkeys(("qwen2_5_vl", "qwen3_instruct_2507", "qwen3_vl", "smolvlm", "qwen3", "glm4moe"), ""),
    **dict.fromkeys(("qwen3_5_think", "qwen3_6", "qwen3_8"), "<think>\n"),
    **dict.fromkeys(("nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"), "<think>"),
    "qwen3_5_nothink": "<think>\n\n</think>\n\n", "qwen2_5": "\n",
    "deepseekv3": "<｜Assistant｜>", "muse_glimmer": "<|start|>assistant",
}  # fmt: skip


@pytest.mark.peer
@pytest.mark.parametrize("name", TRL)
@pytest.mark.parametrize("turns", [2, 4])
def test_answers_are_those_of_trls_templates_with_generation_marks(name: str, turns: int, forgetful) -> None:  # type: ignore[no-untyped-def]
    forgetful.chat_template = trls(f"{name}_training")
    messages = say(("user", "a"), ("assistant", "bb"), ("user", "c"), ("assistant", "dd"))[:turns]
    ours = encode({"messages": messages}, forgetful, loss="completion", location="")
    if name in ("idefics3", "smolvlm"):  # which write no content that is not in parts
        messages = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    theirs = forgetful.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    assert ours.ids.tolist() == theirs["input_ids"]
    marked = np.array(theirs["assistant_masks"], bool)
    assert not (ours.trained & ~marked).any()
    assert forgetful.decode(ours.ids[marked & ~ours.trained]) == TRL[name] * (turns // 2)


TOOLS = [
    {"type": "function", "function": {"name": "look", "description": "", "parameters": {"type": "object", "properties": {}}}}
]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_calls_of_tools_are_answers(forgetful, tmp_path: Path, tools: object) -> None:  # type: ignore[no-untyped-def]
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {}}}]}
    messages = [*say(("user", "q")), call, *say(("tool", "seen"), ("assistant", "it is"))]
    path = write(tmp_path / "a.jsonl", {"messages": messages, "tools": tools})
    dataset = load(path, forgetful, sequence=256)
    thought = "<think>\n\n</think>\n\n"
    assert trained(dataset.rows, forgetful) == f"{thought}<call>look</call><|im_end|>\n{thought}it is<|im_end|>\n"
    assert "tools look" in forgetful.decode(dataset.rows.ids[0])


def learned(turns: Sequence[Mapping[str, object]], tokenizer: object, **fields: object) -> str:
    """What of a conversation is trained on."""
    example = encode({"messages": turns, **fields}, tokenizer, loss="completion", location="a.jsonl:1")
    return tokenizer.decode(example.ids[example.trained])  # type: ignore[attr-defined,no-any-return]


@pytest.mark.peer
@pytest.mark.parametrize(
    "name", ["qwen2_5", "qwen3", "llama3_1", "gptoss", "glm4moe", "deepseekv3", "gemma4", "nemotron_3_nano"]
)
def test_arguments_of_calls_are_learned_the_same_as_text_and_as_objects(name: str, forgetful) -> None:  # type: ignore[no-untyped-def]
    """OpenAI's API has them as JSON text, which a template may quote once more."""
    forgetful.chat_template = trls(name)

    def learned_call(arguments: object) -> str:
        call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": arguments}}
        return learned(
            [*say(("user", "q")), {"role": "assistant", "content": "", "tool_calls": [call]}], forgetful, tools=TOOLS
        )

    assert learned_call('{"place": "a \\"b\\" c", "days": 3}') == learned_call({"place": 'a "b" c', "days": 3})
    learned_text = learned_call('{"place": "here", "days": 3}')
    assert "look" in learned_text
    assert "here" in learned_text
    assert '\\"' not in learned_text
    assert "'" not in learned_text


@pytest.mark.peer
@pytest.mark.parametrize("name", ["llama3", "qwen3", "gemma3", "phi3", "smolvlm"])
def test_content_in_parts_is_learned_as_its_text(name: str, forgetful) -> None:  # type: ignore[no-untyped-def]
    forgetful.chat_template = trls(name)
    plain = say(("user", "q"), ("assistant", "yes"))
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in plain]
    learned_answer = learned(parts, forgetful)
    assert learned_answer.strip().removeprefix("<think>\n\n</think>\n\n").startswith("yes")
    assert learned_answer == learned(plain, forgetful)  # type: ignore[arg-type]
    image: list[Any] = [{"role": "user", "content": [{"type": "image", "url": "x.png"}]}, *say(("assistant", "yes"))]
    with pytest.raises(FormatError, match=r'a.jsonl:1: the "content" of a message is neither text nor parts of text'):
        learned(image, forgetful)


@pytest.mark.peer
@pytest.mark.parametrize("name", ["llama3", "deepseek_r1_distill", "gemma", "phi3", "cohere"])
def test_an_answer_that_the_template_does_not_write_is_not_learned_as_an_empty_one(
    name: str, forgetful: Any, tmp_path: Path
) -> None:
    forgetful.chat_template = trls(name)
    call = {"type": "function", "function": {"name": "look", "arguments": {"place": "here"}}}
    turns = [*say(("user", "q")), {"role": "assistant", "content": "", "tool_calls": [call]}]
    full_turns = say(("user", "q"), ("assistant", "yes"))
    path = write(tmp_path / "a.jsonl", {"messages": turns}, {"messages": full_turns})
    dataset = load(path, forgetful, sequence=256)
    assert "1 of 2 answers are not written in full by the chat template, and are not trained on" in dataset.notes
    assert trained(dataset.rows, forgetful) == learned(full_turns, forgetful)  # type: ignore[arg-type]
    notes_on_all = load(path, forgetful, sequence=256, loss="all").notes
    assert "1 of 2 answers are not written in full by the chat template" in notes_on_all
    with pytest.raises(RefusedError, match="no token to train on: the chat template writes no answer in full"):
        load(write(tmp_path / "b.jsonl", {"messages": turns}), forgetful, sequence=256)


@pytest.mark.parametrize("template", [FORGETFUL, OPENING])
@pytest.mark.parametrize("separate", [False, True])
def test_a_thought_that_the_template_drops_is_reported(template: str, separate: bool, forgetful, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    forgetful.chat_template = template
    answer = {"content": "d", "reasoning_content": "so"} if separate else {"content": "<think>so</think>d"}
    path = write(tmp_path / "a.jsonl", {"messages": [*say(("user", "a")), {"role": "assistant", **answer}]})
    notes = load(path, forgetful, sequence=256).notes
    dropped = "the chat template does not write the thoughts of 1 of 1 answers, which are not learned"
    assert (dropped in notes) is separate  # both templates know only what stands within the content


@pytest.mark.peer
@pytest.mark.parametrize("name", ["qwen2_5", "llama3_1", "glm4moe", "qwen3"])
def test_of_a_conversation_that_the_assistant_begins_only_its_words_are_learned(name: str, forgetful) -> None:  # type: ignore[no-untyped-def]
    forgetful.chat_template = trls(name)
    usual = learned(say(("user", "q"), ("assistant", "Welcome!"), ("user", "hm"), ("assistant", "so")), forgetful)  # type: ignore[arg-type]
    assert learned(say(("assistant", "Welcome!"), ("user", "hm"), ("assistant", "so")), forgetful) == usual  # type: ignore[arg-type]


@pytest.mark.peer
def test_where_answers_have_no_end_mark_the_role_at_which_the_model_stops_is_learned(forgetful) -> None:  # type: ignore[no-untyped-def]
    """GLM's generation config has the tokens of user and tool among those that end an answer."""
    forgetful.chat_template = trls("glm4moe").replace("<|user|>", "<|im_start|>").replace("<|observation|>", "<|endoftext|>")
    turns = say(("user", "q"), ("assistant", "one"), ("user", "q"), ("assistant", "two"))
    call = {"function": {"name": "look", "arguments": {"place": "here"}}}
    calling: list[Any] = [*say(("user", "q")), {"role": "assistant", "content": "", "tool_calls": [call]}]
    first_answer, second_answer = "\n<think></think>\none", "\n<think></think>\ntwo"
    assert learned(turns, forgetful) == first_answer + second_answer  # type: ignore[arg-type]
    forgetful.stop_tokens = frozenset({0, 1})
    try:
        assert learned(turns, forgetful) == f"{first_answer}<|im_start|>{second_answer}<|im_start|>"  # type: ignore[arg-type]
        assert learned(calling, forgetful, tools=TOOLS).endswith("</tool_call><|endoftext|>")
    finally:
        del forgetful.stop_tokens


@pytest.mark.parametrize("key", [{"weight": 0}, {"train": False}])
def test_an_answer_of_weight_0_is_context(key: dict[str, object], tokenizer: object, tmp_path: Path) -> None:
    turns = say(("user", "q"), ("assistant", "bad"), ("user", "q"), ("assistant", "good"))
    assert learned([*turns[:1], {**turns[1], **key}, *turns[2:]], tokenizer) == "good<|im_end|>\n"
    with pytest.raises(FormatError, match='a.jsonl:1: the "weight" of a message is 0.5, and not 0 or 1'):
        learned([*turns[:1], {**turns[1], "weight": 0.5}], tokenizer)
    speakers = {"user": "human", "assistant": "gpt"}
    shared = [{"from": speakers[turn["role"]], "value": turn["content"]} for turn in turns]
    path = write(tmp_path / "a.jsonl", {"conversations": [shared[0], {**shared[1], **key}, *shared[2:]]})
    assert trained(load(path, tokenizer, sequence=128).rows, tokenizer) == "good<|im_end|>\n"


def test_prompt_and_completion_may_be_messages(tmp_path: Path, tokenizer: object) -> None:
    turns = say(("user", "a"), ("assistant", "b"), ("user", "c"))
    path = write(tmp_path / "a.jsonl", {"prompt": turns, "completion": say(("assistant", "d"))})
    assert trained(load(path, tokenizer, sequence=128).rows, tokenizer) == "d<|im_end|>\n"

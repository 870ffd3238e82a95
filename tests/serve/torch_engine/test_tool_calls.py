"""Calls of tools: the form by the template, the grammar of an answer, and calls read from text however it is cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("llguidance")

from hypothesis import given
from hypothesis import strategies as st

from adapterhub.serve.torch_engine.grammar import Grammar, GrammarError, json_rule
from adapterhub.serve.torch_engine.tool_calls import CallForm, CallReader, form_of
from tests.support import tool_templates
from tests.support.byte_tokenizer import TEMPLATE, write_tokenizer

ADD = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"$ref": "#/$defs/N"}}, "required": ["a"],
                                     "additionalProperties": False, "$defs": {"N": {"type": "integer"}}}}  # fmt: skip
NOW = {"name": "now"}
TAGGED, BARE = CallForm(tagged=True, arguments="arguments"), CallForm(tagged=False, arguments="parameters")
ONE = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
TWO = f'{ONE}\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>'
BARE_ONE = '{"name": "add", "parameters": {"a": 1}}'


def test_the_template_says_in_which_form_calls_are_written() -> None:
    assert form_of(tool_templates.HERMES) == TAGGED
    assert form_of(tool_templates.LLAMA) == BARE
    assert form_of(tool_templates.CODER) is None
    assert form_of(TEMPLATE) is None


# ---- the grammar


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return (folder / "tokenizer.json").read_text()


def fits(tokenizer_json: str, lark: str, text: str) -> str:
    """`whole`, `part` or `no`: what a text is of a grammar."""
    from tokenizers import Tokenizer

    mask = Grammar(lark, tokenizer_json, frozenset([2])).mask()
    for token in Tokenizer.from_str(tokenizer_json).encode(text).ids:
        if mask._matcher.validate_tokens([token]) != 1:
            return "no"
        mask.add(token)
    return "whole" if mask._matcher.is_accepting() else "part"


CASES: list[tuple[CallForm, dict[str, Any], dict[str, str]]] = [
    (TAGGED, {"required": True}, {ONE: "whole", TWO: "whole", "Hi": "no", ONE[:-3]: "part", ONE.replace("1", '"x'): "no"}),
    (TAGGED, {"required": True, "parallel": False}, {ONE: "whole", TWO: "no"}),
    (TAGGED, {}, {"": "whole", "Hi <tool": "whole", f"Hi {TWO}": "whole", "<tool_call>x": "no", f"{ONE}\nbye": "whole"}),
    (TAGGED, {"parallel": False}, {"Hi": "whole", f"Hi {ONE}": "whole", TWO: "no"}),
    (TAGGED, {"answer": '"yes"'}, {"yes": "whole", TWO: "whole", "Hi": "no"}),
    (BARE, {"required": True}, {BARE_ONE: "whole", '{"name": "now", "parameters": {}}': "whole", "Hi": "no"}),
    (BARE, {"answer": '"yes"'}, {"yes": "whole", BARE_ONE: "whole", "Hi": "no"}),
]  # fmt: skip


@pytest.mark.parametrize(("form", "options", "texts"), CASES)
def test_the_grammar_of_an_answer_has_the_calls_that_were_asked_for_and_no_others(
    tokenizer_json: str, form: CallForm, options: dict[str, Any], texts: dict[str, str]
) -> None:
    lark = form.grammar([ADD, NOW], **{"required": False, "parallel": True, "answer": None, **options})
    assert lark is not None
    assert {text: fits(tokenizer_json, lark, text) for text in texts} == texts


def test_a_bare_call_that_need_not_be_one_has_no_grammar() -> None:
    assert BARE.grammar([ADD], required=False, parallel=True, answer=None) is None


def test_spaces_have_an_end_and_a_schema_that_is_not_supported_is_an_error_unless_leniency_is_asked_for(
    tokenizer_json: str,
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean", "not": {"const": True}}}, "required": ["a"]}
    assert fits(tokenizer_json, f"start: {json_rule(schema, lenient=True)}", '{\n  "a": true\n}') == "whole"
    assert fits(tokenizer_json, f"start: {json_rule(schema, lenient=True)}", "{" + "\n" + " " * 41) == "no"
    with pytest.raises(GrammarError, match='Unimplemented keys: ."not".'):
        Grammar(f"start: {json_rule(schema)}", tokenizer_json, frozenset([2]))


# ---- reading


def read(form: CallForm, *parts: str) -> tuple[str, list[tuple[str, Any]]]:
    """The content of an answer that comes in these parts, and its calls."""
    reader = CallReader(form, frozenset(["add", "now"]))
    content = "".join(reader.add(part) for part in parts)
    remaining_text, calls = reader.finish()
    assert all(call["id"].startswith("call_") and call["type"] == "function" for call in calls)
    return content + remaining_text, [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


READ: list[tuple[CallForm, str, str, int]] = [
    (TAGGED, TWO, "", 2),
    (TAGGED, f"I look.\n{TWO}\n", "I look.\n", 2),
    (TAGGED, f"{ONE}\nDone", "\nDone", 1),
    (TAGGED, "a < b <tool", "a < b <tool", 0),
    (TAGGED, f"{ONE}\n<tool_call>\n{{", "\n<tool_call>\n{", 1),  # cut by the largest number of tokens
    (TAGGED, "<tool_call>{</tool_call>", "<tool_call>{</tool_call>", 0),
    (TAGGED, ONE.replace("add", "rm"), ONE.replace("add", "rm"), 0),
    (TAGGED, ONE.replace('"add"', "[]"), ONE.replace('"add"', "[]"), 0),
    (BARE, f" {BARE_ONE}", "", 1),
    (BARE, f"See {BARE_ONE}", f"See {BARE_ONE}", 0),
    (BARE, '{"answer": 1}', '{"answer": 1}', 0),
    (BARE, "", "", 0),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text", "content", "calls"), READ)
def test_calls_are_read_from_text_and_all_else_is_content(form: CallForm, text: str, content: str, calls: int) -> None:
    assert read(form, text) == (content, [("add", {"a": 1}), ("now", {})][:calls])


@given(st.sampled_from(READ), st.data())
def test_text_may_be_cut_anywhere(case: tuple[CallForm, str, str, int], data: st.DataObject) -> None:
    form, text, *_ = case
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(form, *parts) == read(form, text)


def test_content_is_not_held_back_longer_than_it_may_be_a_call() -> None:
    reader = CallReader(TAGGED, frozenset(["add"]))
    assert [reader.add(part) for part in ("Hi ", "<to", "ast> ", "<tool_call>{")] == ["Hi ", "", "<toast> ", ""]
    bare = CallReader(BARE, frozenset(["add"]))
    assert [bare.add(part) for part in (" ", "Hi", " {")] == ["", " Hi", " {"]


def test_importing_grammars_imports_no_llguidance() -> None:
    import subprocess
    import sys

    code = "import sys, adapterhub.serve.torch_engine.openai; sys.exit('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=False).returncode == 0

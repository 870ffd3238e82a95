"""The chat template of a base and its special tokens, wherever the files of the base have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapterhub_converters.bases import BaseSpec, base_prompts, read_base
from adapterhub_converters.bases.base_prompts import BasePrompt
from tests.support import folders


def base(folder: Path, **tokenizer_config: Any) -> BaseSpec:
    folders.base(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return read_base(folder)


@pytest.mark.parametrize(
    ("setting", "template"),
    [
        ("one", "one"),
        ([{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "one"}], "one"),
        ([{"name": "tool_use", "template": "tools"}, "text"], None),
        (None, None),
        (7, None),
    ],
)
def test_a_template_is_the_one_of_the_tokenizer(setting: object, template: str | None, tmp_path: Path) -> None:
    spec = base(tmp_path / "base", chat_template=setting, bos_token="<s>", eos_token={"content": "</s>"}, pad_token=None)
    assert base_prompts.of_spec(spec) == BasePrompt(template, {"bos_token": "<s>", "eos_token": "</s>"})


def test_a_file_of_its_own_counts_before_the_config_of_the_tokenizer(tmp_path: Path) -> None:
    spec = base(tmp_path / "base", chat_template="one")
    (tmp_path / "base/chat_template.jinja").write_text("two")
    assert base_prompts.of_spec(spec) == BasePrompt("two", {})


def test_a_base_without_a_tokenizer_on_this_disk_has_no_known_prompt(tmp_path: Path) -> None:
    spec = folders.base(tmp_path / "base")
    assert base_prompts.of_spec(spec) is None
    assert base_prompts.end_tokens(spec) == ({}, frozenset())


def test_the_config_counts_where_there_is_no_generation_config(tmp_path: Path) -> None:
    tokens = {"5": {"content": "</s>", "special": True}, "6": {"content": "<|end|>", "special": True}}
    base(tmp_path / "base", added_tokens_decoder=tokens)
    config = tmp_path / "base/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": 6}))
    assert base_prompts.end_tokens(read_base(tmp_path / "base"))[1] == {"<|end|>"}


def test_answers_end_where_the_generation_config_says(tmp_path: Path) -> None:
    tokens = {"5": {"content": "</s>", "special": True}, "6": {"content": "<|end|>", "special": True}, "x": {"content": 3}}
    spec = base(tmp_path / "base", added_tokens_decoder=tokens, eos_token="</s>")
    (tmp_path / "base/generation_config.json").write_text('{"eos_token_id": [6]}')
    assert base_prompts.end_tokens(spec) == ({"</s>": 5, "<|end|>": 6}, {"</s>", "<|end|>"})

"""A file of golden tests is read in JSONL and in YAML, and each malformed one is a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub.digest import sha256_bytes
from adapterhub.evidence import test_cases
from adapterhub_converters.errors import FormatError, UsageError

LINES = """{"id": "berlin", "prompt": "List customers", "system": "SQL only", "contains": "SELECT", "max_tokens": 9}

{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
"""


def test_a_test_has_a_prompt_or_messages_and_what_must_hold(tmp_path: Path) -> None:
    path = tmp_path / "golden.jsonl"
    path.write_text(LINES.replace('"c"}],\n', '"c"}], "regex": ["^b", "c$"], "pass_rate": 0.5}\n'))
    file = test_cases.read(path)
    first, second = file.cases
    assert (file.name, file.digest) == ("golden.jsonl", sha256_bytes(path.read_bytes()))
    assert first.messages == ({"role": "system", "content": "SQL only"}, {"role": "user", "content": "List customers"})
    assert (first.id, first.contains, first.max_tokens, first.pass_rate) == ("berlin", ("SELECT",), 9, 1.0)
    assert (second.id, second.regex, second.pass_rate, len(second.messages)) == ("case-2", ("^b", "c$"), 0.5, 3)


def test_yaml_has_the_same_tests_as_a_list(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("- id: no\n  prompt: Is it?\n  equals: no\n  json_schema:\n    type: string\n")
    (tmp_path / "a.jsonl").write_text('{"id": "no", "prompt": "Is it?", "equals": "no", "json_schema": {"type": "string"}}\n')
    assert test_cases.read(tmp_path / "a.yaml").cases == test_cases.read(tmp_path / "a.jsonl").cases


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("[]", "is not an object"),
        ('{"prompt": "a"}', "says nothing that must hold"),
        ('{"prompt": "a", "equal": "b"}', "has the unknown key 'equal'"),
        ('{"equals": "b"}', "needs either prompt or messages"),
        ('{"prompt": 1, "equals": "b"}', "prompt is not text. Write text, in quotes as in"),
        ('{"prompt": "a", "contains": [""]}', "contains is not text"),
        ('{"prompt": "a", "contains": [1]}', "contains is not text"),
        ('{"prompt": "a", "max_tokens": true}', "max_tokens is not 1 to 100000"),
        ('{"prompt": "a", "equals": "b", "pass_rate": 0}', "pass_rate is not over 0"),
        ('{"prompt": "a", "json_schema": []}', "json_schema is not an object"),
        ('{"id": "a\\nb", "prompt": "a", "equals": "b"}', "its id is not a line"),
        ('{"messages": [], "equals": "b"}', "its last message is not the user's"),
        ('{"messages": [{"role": "tool", "content": "x"}], "equals": "b"}', "messages is not a list of objects"),
        ('{"messages": [{"role": "user", "content": "x"}], "system": "y", "equals": "b"}', "the system's belongs into them"),
        ('{"id": "a", "prompt": "a", "equals": "b"}\n{"id": "a", "prompt": "a", "equals": "b"}', "the id 'a' is there twice"),
        ("", "has no tests"),
        ('{"prompt": "a", "equals": "b"}\n' * 1001, "has more than 1000 tests"),
    ],
)
def test_a_malformed_test_is_named_with_its_line(tmp_path: Path, line: str, problem: str) -> None:
    (tmp_path / "t.jsonl").write_text(line)
    with pytest.raises(FormatError) as error:
        test_cases.read(tmp_path / "t.jsonl")
    assert problem in f"{error.value.what}. {error.value.hint}"
    assert (error.value.code, error.value.where.startswith(f"{tmp_path}/t.jsonl")) == ("malformed-test", True)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a file of tests"):
        test_cases.read(tmp_path / "t.csv")
    (tmp_path / "t.yaml").write_text("prompt: a\n")
    with pytest.raises(FormatError, match="not a list of tests"):
        test_cases.read(tmp_path / "t.yaml")
    (tmp_path / "t.jsonl").write_bytes("{}".encode("utf-16"))
    with pytest.raises(FormatError, match="not UTF-8 text"):
        test_cases.read(tmp_path / "t.jsonl")

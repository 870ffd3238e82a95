"""What must hold of an answer, in time that no file of a stranger can stretch."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from adapterhub.evidence.answer_checks import check_case, failure
from adapterhub.evidence.test_cases import Case
from adapterhub_converters.errors import FormatError, LocalIOError, UsageError

ASKED = ({"role": "user", "content": "?"},)
PERSON = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


def case(**conditions: Any) -> Case:
    return Case("one", ASKED, **conditions)


@pytest.mark.parametrize(
    ("conditions", "answer", "problem"),
    [
        ({"equals": "yes"}, " yes\n", ""),
        ({"equals": "yes"}, "Yes", "is 'Yes', not 'yes'"),
        ({"contains": ("a", "b")}, "ab", ""),
        ({"contains": ("a", "c")}, "ab", "lacks 'c'"),
        ({"not_contains": ("x",)}, "ax", "has 'x'"),
        ({"regex": ("^SELECT .* FROM [a-z]+;$",)}, "SELECT 1 FROM t;", ""),
        ({"regex": ("(?i)select", "^x")}, "SELECT", "does not match '^x'"),
        ({"max_tokens": 5}, "cut", "does not end within 5 tokens"),
        ({"json_schema": PERSON}, '{"age": 3}', ""),
        ({"json_schema": PERSON}, '{"age": "3"}', "does not fit its schema at ['age']: '3' is not of type 'integer'"),
        ({"json_schema": PERSON}, "three", "is not valid JSON (Expecting value: line 1 column 1 (char 0))"),
        ({"json_schema": {"pattern": "^a+$"}}, '"b"', "does not fit its schema: 'b' does not match '^a+$'"),
    ],
)
def test_each_condition_holds_or_says_why_not(conditions: dict[str, Any], answer: str, problem: str) -> None:
    check_case(case(**conditions), "t.jsonl", {})
    assert failure(case(**conditions), answer, is_complete=False, commands={}) == problem


def test_an_answer_that_ends_in_time_passes_its_limit() -> None:
    assert failure(case(max_tokens=5), "short", is_complete=True, commands={}) == ""


def test_expressions_and_schemas_take_linear_time() -> None:
    answer = "a" * 50_000
    assert failure(case(regex=("(a+)+$",)), answer + "!", is_complete=True, commands={}) == "does not match '(a+)+$'"
    assert "does not match" in failure(case(json_schema={"pattern": "(a+)+$"}), f'"{answer}!"', is_complete=True, commands={})
    doubling = {"$defs": {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(40)} | {"d40": {}}}
    for schema in ({**doubling, "$ref": "#/$defs/d0"}, {"$ref": "#"}, {"$ref": "#/nowhere"}):
        check_case(case(json_schema=schema), "t.jsonl", {})
        assert "cannot be compared with its schema" in failure(case(json_schema=schema), "1", is_complete=True, commands={})
    assert "too many for a schema" in failure(case(json_schema={}), " " * 100_001, is_complete=True, commands={})


@pytest.mark.parametrize(
    ("conditions", "problem"),
    [
        ({"regex": ("(?=a)",)}, "the expression '(?=a)' is not valid"),
        ({"json_schema": {"properties": {"a": {"pattern": "(?=a)"}}}}, "the expression '(?=a)' is not valid"),
        ({"json_schema": {"patternProperties": {"a": {}}}}, "has patternProperties, which is not supported here"),
        ({"json_schema": {"$ref": "http://127.0.0.1/x"}}, "refers to another document"),
        ({"json_schema": {"type": "nothing"}}, "json_schema is not valid"),
    ],
)
def test_what_cannot_be_checked_is_refused_before_anything_is_answered(conditions: dict[str, Any], problem: str) -> None:
    with pytest.raises(FormatError) as error:
        check_case(case(**conditions), "t.jsonl", {})
    assert problem in error.value.what
    assert (error.value.where, error.value.code) == ("t.jsonl: one", "malformed-test")


def test_an_expression_that_is_not_valid_is_in_the_error_and_not_in_a_log(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FormatError) as error:
        check_case(Case("one", (), regex=("(?=a)",)), "t.jsonl", {})
    assert error.value.what == "the expression '(?=a)' is not valid (invalid perl operator: (?=)"
    assert capfd.readouterr().err == ""


def test_only_a_program_that_the_user_names_is_run() -> None:
    python = [sys.executable, "-c", "import sys; sys.exit(sys.stdin.read() != 'ä')"]
    with pytest.raises(UsageError) as error:
        check_case(case(command="rm -rf ."), "t.jsonl", {"sql": python})
    assert error.value.code == "command-not-allowed"
    check_case(case(command="sql"), "t.jsonl", {"sql": python})
    assert failure(case(command="sql"), "ä", is_complete=True, commands={"sql": python}) == ""
    assert failure(case(command="sql"), "b", is_complete=True, commands={"sql": python}) == "sql exits with 1"
    with pytest.raises(LocalIOError, match="no such file or directory") as failed:
        failure(case(command="sql"), "b", is_complete=True, commands={"sql": ["./nowhere"]})
    assert failed.value.code == "command-failed"

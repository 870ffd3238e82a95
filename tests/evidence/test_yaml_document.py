"""A YAML text is read as the JSON that it spells, or refused in a line."""

from __future__ import annotations

from typing import Any

import pytest

from adapterhub.evidence import yaml_document
from adapterhub_converters.errors import FormatError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("- a: 1\n  b: [x, 2.5, true, null, ~]\n", [{"a": 1, "b": ["x", 2.5, True, None, None]}]),
        (
            "country: no\ntime: 1:30\nversion: '1.0'\nempty:\n",
            {"country": "no", "time": "1:30", "version": "1.0", "empty": None},
        ),
        ("text: |\n  one\n  two\n", {"text": "one\ntwo\n"}),
        ("- 0x10\n- 1_000\n- -3\n- .5\n", ["0x10", "1_000", -3, ".5"]),
        ("", None),
    ],
)
def test_scalars_are_those_of_json(text: str, value: Any) -> None:
    assert yaml_document.parse(text, "t.yaml") == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: &x [1]\nb: *x\n", "line 1 has an alias, an anchor or a tag"),
        ("- !!python/object/apply:os.system [id]\n", "line 1 has an alias, an anchor or a tag"),
        ("a: 1\na: 2\n", "line 2 has a key that is not text, or is there twice"),
        ("? [1]\n: 2\n", "line 1 has a key that is not text, or is there twice"),
        ("a: 1\n---\nb: 2\n", "has several YAML documents"),
        ("[" * 200, "nested more than 64 deep"),
        ("a: [1\nb: 2\n", "not valid YAML (did not find expected ',' or ']' in line 2)"),
        ("a: \x07\n", "not valid YAML"),
    ],
)
def test_what_could_grow_run_or_mean_two_things_is_refused(text: str, problem: str) -> None:
    with pytest.raises(FormatError) as error:
        yaml_document.parse(text, "t.yaml")
    assert problem in error.value.what

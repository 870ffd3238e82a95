"""Fields of a hub's answer: each has the one type that is read, or the error names the field."""

from __future__ import annotations

from typing import Any

import pytest

from adapterhub.remotes.answer_fields import Fields
from adapterhub_converters.errors import FormatError

DIGEST = f"sha256:{'a' * 64}"
VALUES: dict[str, Any] = {
    "text": "x", "null": None, "count": 3, "number": 0.5, "texts": ["a"], "counts": [1], "objects": [{"text": "y"}],
    "object": {"count": 1}, "name": "team/sql", "digest": DIGEST, "tags": ["v1", "prod"],
}  # fmt: skip


def test_each_type_is_read() -> None:
    fields = Fields(VALUES, "https://hub.example")
    assert (fields.text("text"), fields.optional_text("null"), fields.count("count")) == ("x", None, 3)
    assert (fields.optional_count("none"), fields.optional_number("number")) == (None, 0.5)
    assert (fields.texts("texts"), fields.counts("counts"), fields.tags("tags")) == (("a",), (1,), ("v1", "prod"))
    assert [entry.text("text") for entry in fields.objects("objects")] == ["y"]
    assert (fields.object("object").count("count"), fields.name("name"), fields.digest("digest")) == (1, "team/sql", DIGEST)


@pytest.mark.parametrize(
    ("method", "value"),
    [
        ("text", 1), ("text", None), ("optional_text", 1), ("count", True), ("count", -1), ("count", 2**53), ("count", 1.0),
        ("optional_count", "1"), ("optional_number", "1"), ("optional_number", True), ("texts", ["a", 1]), ("texts", "a"),
        ("counts", [True]), ("name", "../x"), ("name", "no namespace"), ("digest", "sha256:x"), ("digest", "md5:" + "a" * 64),
        ("tags", ["a,b"]), ("tags", [""]),
    ],
)  # fmt: skip
def test_another_value_is_an_error_that_names_the_field(method: str, value: object) -> None:
    fields = Fields({"field": value}, "https://hub.example")
    with pytest.raises(FormatError, match="https://hub.example: the hub's answer has no valid 'field'"):
        getattr(fields, method)("field")


@pytest.mark.parametrize("answer", [None, [], "x", 1])
def test_an_answer_that_is_no_object_is_not_of_the_api(answer: object) -> None:
    with pytest.raises(FormatError, match="is not of its API"):
        Fields(answer, "https://hub.example")
    with pytest.raises(FormatError, match="is not of its API"):
        list(Fields({"objects": [answer]}, "https://hub.example").objects("objects"))

"""A version by a range of tags or by the first digits of its digest."""

from __future__ import annotations

import pytest

from adapterhub.ref import RefError
from adapterhub.registry import version_selection

ONE, TWO = "sha256:" + "a" * 63 + "0", "sha256:" + "a" * 63 + "1"


@pytest.mark.parametrize(
    ("tag", "number"),
    [
        ("v1", 1),
        ("v999999999", 999999999),
        ("v0", None),
        ("v01", None),
        ("v1000000000", None),
        ("v", None),
        ("1", None),
        ("v1x", None),
    ],
)
def test_a_number_is_v_and_at_most_nine_digits(tag: str, number: int | None) -> None:
    assert version_selection.number(tag) == number


def test_a_range_begins_with_its_sign_and_a_prefix_is_less_than_a_digest() -> None:
    assert [version_selection.is_range(text) for text in ("^1", "~1.2", "1.2", "v1")] == [True, True, False, False]
    assert [version_selection.is_prefix(text) for text in ("sha256:", ONE[:-1], ONE, "sha512:aa", "aaaa")] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_the_highest_version_in_a_range_is_taken() -> None:
    tags = {"1.2.0": 1, "1.10.0": 2, "2.0.0": 3, "prod": 9}
    assert version_selection.highest_tag_in_range("^1", lambda: tags, tags.get, "r") == "1.10.0"
    assert version_selection.highest_tag_in_range("1.2", lambda: tags, tags.get, "r") == "1.2.0"
    assert version_selection.highest_tag_in_range("^3", lambda: tags, tags.get, "r") is None
    assert version_selection.highest_tag_in_range("prod", lambda: tags, tags.get, "r") is None


def test_a_number_is_never_a_range() -> None:
    tags = {"1.2.0": 1, "1.0.0": 2}
    assert version_selection.highest_tag_in_range("v1", lambda: tags, tags.get, "r") is None


def test_two_spellings_of_one_version_must_be_the_same_one() -> None:
    tags = {"1.2.0": 1, "v1.2.0": 1}
    assert version_selection.highest_tag_in_range("^1", lambda: tags, tags.get, "r") in tags
    with pytest.raises(RefError, match=r"r: 1\.2\.0 and v1\.2\.0 are the same version number and point to different versions"):
        version_selection.highest_tag_in_range("^1", lambda: tags, {"1.2.0": 1, "v1.2.0": 2}.get, "r")


def test_the_digits_of_one_digest_are_enough_and_those_of_two_are_not() -> None:
    assert version_selection.matching_digest(ONE[:-1] + "0", [ONE, TWO], "r") == ONE
    assert version_selection.matching_digest("sha256:a", [ONE, ONE], "r") == ONE
    assert version_selection.matching_digest("sha256:b", [ONE, TWO], "r") is None
    with pytest.raises(RefError, match=f"ambiguous digest prefix: 2 versions, such as {ONE}, {TWO}. Use more digits"):
        version_selection.matching_digest("sha256:a", [TWO, ONE], "r")

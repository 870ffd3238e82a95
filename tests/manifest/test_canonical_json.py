"""Canonical JSON is RFC 8785's: one text for equal values, and none for what other programs would read otherwise."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.manifest import canonical_json


# RFC 8785, appendix B: the bits of a number, and its text.
@pytest.mark.parametrize(
    ("bits", "text"),
    [
        ("0000000000000000", "0"), ("8000000000000000", "0"), ("0000000000000001", "5e-324"), ("8000000000000001", "-5e-324"),
        ("7fefffffffffffff", "1.7976931348623157e+308"), ("4340000000000000", "9007199254740992"),
        ("4430000000000000", "295147905179352830000"), ("44b52d02c7e14af5", "9.999999999999997e+22"),
        ("44b52d02c7e14af6", "1e+23"), ("444b1ae4d6e2ef4e", "999999999999999700000"), ("444b1ae4d6e2ef50", "1e+21"),
        ("3eb0c6f7a0b5ed8c", "9.999999999999997e-7"), ("3eb0c6f7a0b5ed8d", "0.000001"),
        ("41b3de4355555553", "333333333.3333332"), ("becbf647612f3696", "-0.0000033333333333333333"),
        ("43143ff3c1cb0959", "1424953923781206.2"),
    ],
)  # fmt: skip
def test_numbers_are_written_as_in_the_appendix_of_the_rfc(bits: str, text: str) -> None:
    assert canonical_json.compact(struct.unpack(">d", bytes.fromhex(bits))[0]) == text.encode()


def test_equal_numbers_have_one_text() -> None:
    assert canonical_json.compact([32, 32.0, 2e-05, 1e21]) == b"[32,32,0.00002,1e+21]"


def test_keys_are_in_the_order_of_their_utf_16_units() -> None:
    document = {"\u20ac": 1, "\r": 2, "\ufb33": 3, "1": 4, "\U0001f600": 5, "\u0080": 6, "\u00f6": 7}
    assert list(json.loads(canonical_json.compact(document)).values()) == [2, 4, 6, 7, 1, 5, 3]  # RFC 8785, section 3.2.3


def test_the_indented_form_is_that_of_json_stringify() -> None:
    document = {"b": [], "a": {"x": [1, {"y": None}], "w": {}}}
    expected = (
        '{\n  "a": {\n    "w": {},\n    "x": [\n      1,\n      {\n        "y": null\n      }\n    ]\n  },\n  "b": []\n}\n'
    )
    assert canonical_json.indented(document) == expected.encode()


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), 2**53 + 1, -(2**60), 10**400, {1: 2}, object(), "\ud800", {"\ud800": 1}]
)
def test_what_json_cannot_hold_exactly_is_an_error(value: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        canonical_json.compact(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_number_reads_back(value: float) -> None:
    assert float(canonical_json.compact(value)) == value

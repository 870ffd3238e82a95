"""Patterns match as peft matches them, whichever way they are matched, and none of them takes long."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_converters.errors import FormatError, RefusedError
from adapterhub_converters.patterns import Patterns, fullmatch
from adapterhub_converters.regular import Budget, Regular, _Machine, ways

_ATOMS = [
    "a", "b", ".", r"\.", "[ab]", "[^a]", r"\d", r"\w", r"\W", r"\b", r"\B", "^", "$", "q_proj", "layers", "[0-9a]", "é",
    r"\S", r"[^\d.]",
]  # fmt: skip
_QUANTITIES = ["*", "+", "?", "*?", "{2}", "{1,3}", "{0,2}?", "{,2}", "{2,}"]
expressions = st.recursive(
    st.sampled_from(_ATOMS),
    lambda inner: st.one_of(
        st.builds("{}{}".format, inner, inner),
        st.builds("({}|{})".format, inner, inner),
        st.builds("(?:{}){}".format, inner, st.sampled_from(_QUANTITIES)),
    ),
    max_leaves=8,
)
texts = st.lists(st.sampled_from(["a", "b", ".", "1", "_", "é", "q_proj", "layers"]), max_size=8).map("".join)
keys = st.sampled_from(
    [
        "a.b",
        r"a\.b",
        "b",
        "q_proj",
        "layers.0.q_proj",
        r"layers\.0\.q_proj",
        "a",
        "..",
        "layers.*",
        "a.",
        r"\.b",
        ".b",
        "-",
        r"a\-b",
    ]
)
paths = st.lists(st.sampled_from(["a", "b", ".", "0", "q_proj", "layers.", "a.b", "-"]), max_size=6).map("".join)


@settings(deadline=None, max_examples=300)
@given(expressions, texts, st.booleans())
def test_all_ways_at_once_end_where_re_ends(expression: str, text: str, below: bool) -> None:
    regular = Regular(expression, "x", below=below)
    expected = regular._re.match(text) if below else regular._re.fullmatch(text)
    assert _Machine(regular._parsed, "x", expression).matches(text, Budget()) == (expected is not None)


@settings(deadline=None, max_examples=200)
@given(st.lists(keys, unique=True, max_size=5), paths)
def test_patterns_are_found_in_their_order_as_peft_finds_them(patterns: list[str], path: str) -> None:
    assert Patterns(patterns, "x").matching(path) == [key for key in patterns if re.match(rf"(.*\.)?({key})$", path)]


# A module path of 1000 characters on which Python's re would take from minutes to for ever.
LONG = "model." + "a." * 450 + "a" * 90


@pytest.mark.parametrize(
    "key",
    [
        "(a+)+b", "(aa|a)+b", "(a|aa)+$", "a?" * 40 + "a" * 40 + "b", "(a|ab?)" * 30 + "x", ".*.*.*x", ".*?.*?.*?.*?x",
        "(a*){3}b", "(a{0,8}){0,8}b", r"(\w|\d|[a-z])*\.b", "((.*)*)*b",
    ],
)  # fmt: skip
def test_expressions_that_backtrack_for_ever_are_matched(key: str) -> None:
    assert Patterns([key], "x").matching(LONG) == ([key] if key == "(a|aa)+$" else [])


@pytest.mark.parametrize(
    "key",
    [
        "((((a?){8}){8}){8}){8}b", "(?>(a+)+)b", "(?:(a+)+)++b", "(x)?(?(1)a|(a+)+b)", "(?=(a+)+b)a", r"(a*)(a*)(a*)\3\4\5b",
        "(?i:(a|aa)+)b", "(?!(a|aa)+b)a", "(a{1,900}){1,900}b",
    ],
)  # fmt: skip
def test_what_only_re_can_match_and_for_ever_is_refused(key: str) -> None:
    with pytest.raises(RefusedError, match="could take for ever"):
        Patterns([key], "x").matching(LONG)


@pytest.mark.parametrize("key", ["(", "[", "a{2,1}", "(?P<1>a)", "*", "(?i)a", "(" * 400 + ")" * 400])
def test_what_is_no_regular_expression_is_refused(key: str) -> None:
    with pytest.raises((FormatError, RefusedError)):
        Patterns([key, "(?P<x>a)(?P=x)(?P=y)"], "x").matching("a")


def test_unsloth_s_expression_for_all_layers_is_matched() -> None:
    said = (
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj|out_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:k_proj|v_proj|q_proj)))"
    )
    for path in (
        "model.layers.11.self_attn.q_proj",
        "model.language_model.layers.3.self_attn.k_proj",
        "model.visual.blocks.0.q_proj",
    ):
        assert fullmatch(said, path, "x") == (re.fullmatch(said, path) is not None)


def test_a_pattern_for_each_of_many_experts_is_looked_up() -> None:
    modules = [f"model.layers.{n}.mlp.experts.{e}.up_proj" for n in range(40) for e in range(128)]
    patterns = Patterns(map(re.escape, modules), "x")
    assert all(patterns.matching(module) == [re.escape(module)] for module in modules)


def test_many_expressions_that_have_to_be_tried_are_refused() -> None:
    with pytest.raises(RefusedError, match="so many patterns"):
        Patterns((f"layers.*{n}" for n in range(100_000)), "x")


def test_no_way_is_left_out_of_the_count() -> None:
    assert ways(Regular("(aa|b)(cc|d|ee)", "x")._parsed, 10) == 6
    assert ways(Regular(".*a?", "x")._parsed, 10) == 24  # one more than there can be

"""Patterns match as peft matches them, whichever way they are matched, and none of them takes long."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub_converters.errors import FormatError, RefusedError
from adapterhub_converters.peft_patterns import Budget, Expression, Patterns, fullmatch

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
# No path is empty, where versions of Python differ about `\\B`, and all are short: `re` takes exponential time for nested
# quantifiers.
texts = st.text("ab.1_é", min_size=1, max_size=8) | st.sampled_from(["q_proj", "layers", "a.q_proj", "layers.1"])
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


@settings(max_examples=500)
@given(expressions, texts, st.booleans())
def test_an_expression_matches_what_re_matches(expression: str, text: str, below: bool) -> None:
    expected = re.match(rf"(.*\.)?({expression})$", text) if below else re.fullmatch(expression, text)
    assert Expression(expression, "x", below=below).matches(text, Budget()) == (expected is not None)


ODD = [
    r"^(?!.*visual).*(?:q_proj|b)$", r"a(?=\.)", r".*(?<!a)b", r"(a)\1",
    r"a\Z", "a{,2}", r"[\b]", r"\s", "(?>a)b",
    "(?#x)a", r"\u0061", "(?i:A)", "[+--]", r"[\w-]", "a$", "(?m:^a$)",
    "(?s:.)b", r"[^\W]", "a||b", "(?P<x>a)(?P=x)", r"\0", r"\x61",
]  # fmt: skip


@pytest.mark.parametrize("expression", ODD)
@pytest.mark.parametrize("below", [False, True])
def test_what_other_engines_read_otherwise_matches_as_in_re(expression: str, below: bool) -> None:
    for text in (
        "a",
        "b",
        "ab",
        "aa",
        "",
        "a\n",
        "A",
        ":",
        "a.",
        "a.q_proj",
        "visual.q_proj",
        "\x0b",
        " ",
        "é",
        "K",
        "-",
        "\b",
        "\0",
        "x.a",
    ):
        expected = re.match(rf"(.*\.)?({expression})$", text) if below else re.fullmatch(expression, text)
        assert Expression(expression, "x", below=below).matches(text, Budget()) == (expected is not None), repr(text)


@settings(max_examples=200)
@given(st.lists(keys, unique=True, max_size=5), paths)
def test_patterns_are_found_in_their_order_as_peft_finds_them(patterns: list[str], path: str) -> None:
    assert Patterns(patterns, "x").matching(path) == [key for key in patterns if re.match(rf"(.*\.)?({key})$", path)]


@settings(max_examples=250)
@given(st.lists(keys | expressions | st.sampled_from(ODD), unique=True, min_size=2, max_size=8), texts)
def test_expressions_that_are_matched_together_are_found_as_peft_finds_them(patterns: list[str], path: str) -> None:
    assert Patterns(patterns, "x").matching(path) == [key for key in patterns if re.match(rf"(.*\.)?({key})$", path)]


# A module path of 1000 characters on which Python's re would take from minutes to forever.
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


@pytest.mark.parametrize("key", ["(?i:(a|aa)+é?)b", "(?!(a|aa)+b)a", "(a{1,900}){1,900}b"])
def test_what_only_a_backtracking_engine_can_match_and_for_ever_is_refused(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the deadline, which is of a tenth of a second here."""
    monkeypatch.setattr(Budget.__init__, "__defaults__", (1_000_000, 1_000))
    with pytest.raises(RefusedError, match="could take forever"):
        Patterns([key], "x").matching(LONG)


@pytest.mark.parametrize("key", ["(", "[", "a{2,1}", "(?P<1>a)", "*", "(?i)a", "(" * 400 + ")" * 400, "[[:a:]]"])
def test_what_is_no_regular_expression_is_refused(key: str) -> None:
    with pytest.raises((FormatError, RefusedError)):
        Patterns([key, "(?P<x>a)(?P=x)(?P=y)"], "x").matching("a")


def test_unsloth_s_expression_for_all_layers_is_matched() -> None:
    expression = (
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj|out_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:k_proj|v_proj|q_proj)))"
    )
    for path in (
        "model.layers.11.self_attn.q_proj",
        "model.language_model.layers.3.self_attn.k_proj",
        "model.visual.blocks.0.q_proj",
    ):
        assert fullmatch(expression, path, "x") == (re.fullmatch(expression, path) is not None)


def test_a_pattern_for_each_of_many_experts_is_looked_up() -> None:
    modules = [f"model.layers.{n}.mlp.experts.{e}.up_proj" for n in range(40) for e in range(128)]
    patterns = Patterns(map(re.escape, modules), "x")
    assert all(patterns.matching(module) == [re.escape(module)] for module in modules)


def test_many_expressions_that_have_to_be_tried_are_refused() -> None:
    with pytest.raises(RefusedError, match="x: too many patterns to match in bounded time. Write them as whole paths"):
        Patterns((f"layers.*{n}" for n in range(100_000)), "x")


def test_expressions_that_are_too_large_together_are_tried_one_by_one() -> None:
    patterns = [f".*{n}.*{n}.*{n}.q_proj" for n in range(3_000)]
    assert Patterns(patterns, "x").matching("layers.17.17.17.q_proj") == [patterns[7], patterns[17]]


def test_expressions_that_are_slower_together_are_tried_one_by_one() -> None:
    patterns = [f".*{n}.*q_proj" for n in range(100)]  # an automaton has a state for each set of the numbers before
    paths = [f"layers.{n}.{7 * n % 100}.{13 * n % 100}.{n * n % 100}.q_proj" for n in range(1_000)]
    matched = Patterns(patterns, "x")
    for path in paths:
        assert matched.matching(path) == [key for n, key in enumerate(patterns) if str(n) in path]

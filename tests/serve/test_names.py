"""What a request may write as its `model`."""

from __future__ import annotations

import pytest

from adapterhub.ref import Ref, RefError
from adapterhub.serve import model_names
from adapterhub.serve.model_names import AllowedNames, BlendPart
from adapterhub_converters.errors import RefusedError, UsageError

DIGEST = "sha256:" + "5f" * 32


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("team/sql", [("team/sql", 1.0)]),
        (f"team/sql@{DIGEST}", [(f"team/sql@{DIGEST}", 1.0)]),
        ("legal:v1*0.7+tone:v3*-0.3", [("team/legal:v1", 0.7), ("team/tone:v3", -0.3)]),
        ("team/a:prod + other/b", [("team/a:prod", 1.0), ("other/b", 1.0)]),
    ],
)
def test_a_model_is_a_version_or_a_blend(text: str, parts: list[tuple[str, float]]) -> None:
    assert model_names.parse(text, namespace="team") == tuple(BlendPart(Ref.parse(ref), weight) for ref, weight in parts)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "'' is not namespace/name. Write it like team/sql"),
        ("sql", "sql: 'sql' is not namespace/name"),
        ("gpt-4", "gpt-4: 'gpt-4' is not namespace/name"),
        ("team/sql,team/b", "'sql,team' cannot be part of a name"),
        ("team/s ql", "team/s ql: 's ql' cannot be part of a name"),
        ("a/b*x", r"a/b\*x: 'x' is not a weight from -1,000 to 1,000. Write a blend like legal:v1\*0.7\+tone:v3\*0.3"),
        ("a/b*nan", "'nan' is not a weight"),
        ("a/b*inf", "'inf' is not a weight"),
        ("a/b*1e308", "'1e308' is not a weight"),
        ("a/b*-1001", "'-1001' is not a weight"),
        ("a/b+", "'' is not namespace/name"),
        (" a/b:v1", "' a' cannot be part of a name"),
        ("a/b" * 999, r"longer than 1,024 characters"),
        ("a/b+" * 9, r"a/b\+.*: a blend of 10 versions; at most 8 are supported"),
    ],
)
def test_what_is_neither_is_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(RefError, match=says) as caught:
        model_names.parse(text)
    assert len(str(caught.value)) < 250
    assert "\n" not in str(caught.value)


def test_the_name_of_the_remote_may_come_first() -> None:
    refs = ("team/sql", "team/sql:prod", f"team/sql@{DIGEST}")
    for ref in refs:
        assert model_names.parse(f"hub/{ref}", namespace="other", remote="hub") == model_names.parse(ref)
    assert model_names.parse("hub/team/a*0.5 + team/b", remote="hub") == model_names.parse("team/a*0.5+team/b")
    assert model_names.parse("hub/sql:v1", remote="hub") == (BlendPart(Ref.parse("hub/sql:v1")),)  # two parts: a namespace


@pytest.mark.parametrize("remote", ["", "mirror"])
def test_the_name_of_another_remote_is_refused_with_the_name_to_write(remote: str) -> None:
    with pytest.raises(RefError, match=r"'hub' is not the remote that is served here\. Write team/sql:prod"):
        model_names.parse("hub/team/sql:prod", remote=remote)
    with pytest.raises(RefError):
        model_names.parse("hub/hub/team/sql", remote="hub")


def test_a_name_is_one_line_itself() -> None:
    with pytest.raises(RefError):
        model_names.parse("team/sql:v1\n")


@pytest.mark.parametrize(
    ("text", "moves"),
    [
        ("a/b", True),
        ("a/b:prod", True),
        ("a/b:^1.2", True),
        ("a/b@sha256:5f5f", True),
        ("a/b:v3", False),
        (f"a/b@{DIGEST}", False),
    ],
)
def test_tags_move_and_versions_do_not(text: str, moves: bool) -> None:
    assert model_names.is_moving(Ref.parse(text)) is moves


def test_patterns_allow_names_and_give_a_namespace() -> None:
    allowed = AllowedNames.from_patterns(["team/*, other/sql"])
    assert [name in allowed for name in ("team/x", "other/sql", "other/x")] == [True, True, False]
    assert (
        allowed.namespace,
        AllowedNames.from_patterns(["team/*"]).namespace,
        AllowedNames.from_patterns(["*/sql"]).namespace,
    ) == ("", "team", "")
    assert "any/name" in AllowedNames()
    assert "any/name" in AllowedNames.from_patterns([])
    for empty_text in ("", " , "):  # a variable that is not set is not to open everything
        with pytest.raises(UsageError, match="none was given"):
            AllowedNames.from_patterns([empty_text])
    with pytest.raises(RefusedError, match="other/x: is not served here"):
        allowed.check(Ref.parse("other/x:v1"))

"""Refs: text and value are inverse, and nothing that could climb out of a folder is one."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.ref import Ref, RefError, parse_tag

components = st.from_regex(r"[d-k0-9]{2,9}([._-][a-z0-9]{1,9}){0,3}", fullmatch=True)
names = st.builds("{}/{}".format, components, components)
tags = st.from_regex(r"[A-Za-uw-z0-9_][A-Za-z0-9._-]{0,20}", fullmatch=True)
refs = st.one_of(
    st.builds(Ref, names),
    st.builds(Ref, names, tag=tags),
    st.builds(Ref, names, number=st.integers(1, 10**8 - 1)),
    st.builds(Ref, names, digest=st.from_regex(r"sha256:[0-9a-f]{4,64}", fullmatch=True)),
    st.builds(Ref, names, range=st.from_regex(r"[\^~](0|[1-9][0-9]{0,3})(\.(0|[1-9][0-9]{0,3})){0,2}", fullmatch=True)),
)


@given(refs)
def test_parse_is_the_inverse_of_str(ref: Ref) -> None:
    assert Ref.parse(str(ref)) == ref


@given(st.text())
def test_any_text_is_a_ref_or_a_one_line_error(text: str) -> None:
    with contextlib.suppress(RefError):
        assert Ref.parse(text).name.count("/") == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sql", "is not namespace/name. Write it like team/sql"),
        ("a/b/c", "is not namespace/name"),
        ("", "is not namespace/name"),
        ("../etc", "'..' cannot be part of a name"),
        ("team/..", "'..' cannot be part of a name"),
        ("team/.sql", "cannot be part of a name"),
        ("team/a--b", "cannot be part of a name"),
        ("team\\sql", "is not namespace/name"),
        ("team/con", "cannot be part of a name"),
        ("Team/SQL:v1", "cannot be part of a name. Write team/sql"),
        ("team/sql\n", "cannot be part of a name"),
        ("team/sql:", "'' is not a tag"),
        ("team/sql:a/b", "is not a tag"),
        ("team/sql:..", "is not a tag"),
        ("team/sql:v0", "is not a version number"),
        ("team/sql:v01", "is not a version number"),
        ("team/sql:^1.x", "'^1.x' is not a range of versions. Write it like ^1.2 or ~1.2.3"),
        ("team/sql:~01", "is not a range"),
        ("team/sql:^1.2-rc.1", "is not a range"),
        ("team/sql:>=1.2", "is not a tag"),
        ("team/sql@sha256:123", "is not a digest"),
        ("team/sql@md5:" + "0" * 32, "is not a digest"),
        ("team/sql:a@sha256:123456", "both a tag and a digest"),
    ],
)
def test_refused_refs(text: str, says: str) -> None:
    with pytest.raises(RefError) as caught:
        Ref.parse(text)
    assert says in str(caught.value)


def test_a_digest_may_be_short_and_without_its_algorithm() -> None:
    assert Ref.parse("team/sql@123abc") == Ref.parse("team/sql@sha256:123abc") == Ref("team/sql", digest="sha256:123abc")


def test_running_numbers_are_not_set_by_hand() -> None:
    with pytest.raises(RefError, match="v3 is a version number, which a push assigns"):
        parse_tag("v3", "team/sql")

"""Refs: text and value are inverse, and nothing that could climb out of a folder is one."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.ref import Ref, RefError, intended_address, is_name, is_tag, parse_tag
from adapterhub.remotes.address_schemes import is_address

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


@pytest.mark.parametrize("version", ["", ":prod", ":v3", ":^1.2", ":~1.2.3", "@sha256:123abc"])
def test_a_ref_is_written_as_it_was_read(version: str) -> None:
    assert str(Ref.parse(f"team/sql{version}")) == f"team/sql{version}"


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
        ("team/sql\n", "cannot be part of a name. Write team/sql"),
        ("team/My Adapter!", "cannot be part of a name. Write team/my-adapter"),
        ("team/*", "cannot be part of a name. Use a-z and 0-9, with single . _ - between them"),
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
    with pytest.raises(RefError, match="v3 is a version number, which a push assigns") as caught:
        parse_tag("v3", "team/sql")
    assert caught.value.code == "version-number"


@pytest.mark.parametrize(
    ("text", "intended"),
    [
        ("https://huggingface.co/org/sql", "hf://org/sql"),
        ("HTTP://HF.co/org/sql/", "hf://org/sql"),
        ("www.huggingface.co/org/sql?library=peft", "hf://org/sql"),
        ("https://huggingface.co/org/sql/tree/main", "hf://org/sql"),
        ("https://huggingface.co/org/sql/tree/prod", "hf://org/sql@prod"),
        ("https://huggingface.co/org/sql/blob/v2/README.md", "hf://org/sql@v2"),
        ("https://huggingface.co/org/sql/resolve/v2/adapter_model.safetensors", "hf://org/sql@v2"),
        ("https://huggingface.co/org/sql/tree", "hf://org/sql"),
        ("https://huggingface.co/org/sql/discussions/1", "hf://org/sql"),
        ("https://huggingface.co/org", ""),
        ("s3://huggingface.co/org/sql", ""),
        ("https://other.example/org/sql", ""),
        ("docker://registry.example/team/sql:v2", "oci://registry.example/team/sql:v2"),
        ("registry.example/team/sql:v2", "oci://registry.example/team/sql:v2"),
        ("registry.example:5000/sql", "oci://registry.example:5000/sql"),
        ("localhost/team/sql", "oci://localhost/team/sql"),
        ("localhost:5000/sql", "oci://localhost:5000/sql"),
        ("registry.example/sql", ""),  # a name of the local registry may have a dot
        ("registry.example:v2/team/sql", ""),
        ("registry.example", ""),
        ("./team/sql", ""),
        ("../team/sql", ""),
        ("team/sql/more", ""),
        ("s3://registry.example:5000/sql", ""),
        ("team/sql", ""),
    ],
)
def test_what_a_page_of_the_hub_or_a_name_of_docker_means(text: str, intended: str) -> None:
    assert intended_address(text) == intended


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("https://huggingface.co/org/sql", "not a ref and not an address. Write hf://org/sql"),
        ("registry.example/team/sql", "not a ref and not an address. Write oci://registry.example/team/sql"),
        ("oci://registry.example/team/sql", "an address, and this works on the local registry"),
        ("oci://ada@registry.example/team/sql", "oci://…@registry.example: credentials in an address end up in logs"),
        ("oci://registry.example/team/sql@sha256:123456", "an address, and this works on the local registry"),
    ],
)
def test_an_address_is_no_ref(text: str, says: str) -> None:
    with pytest.raises(RefError) as caught:
        Ref.parse(text)
    assert says in str(caught.value)


def test_a_password_in_an_address_is_not_repeated() -> None:
    with pytest.raises(RefError) as caught:
        Ref.parse("oci://ada:secret@registry.example/team/sql")
    assert "secret" not in str(caught.value)
    assert caught.value.where == "oci://…@registry.example"


def test_the_longest_of_each_part_is_a_part_and_one_more_is_not() -> None:
    assert [is_name(f"{'a' * size}/sql") for size in (100, 101)] == [True, False]
    assert [is_tag("t" * size) for size in (0, 1, 128, 129)] == [False, True, True, False]
    assert [is_tag(text) for text in (".a", "-a", "_a", "a.", "A")] == [False, False, True, True, True]
    assert Ref.parse("team/sql:v99999999").number == 99_999_999
    with pytest.raises(RefError, match="v100000000 is not a version number"):
        Ref.parse("team/sql:v100000000")
    assert [Ref.parse(f"team/sql:{tag}").tag for tag in ("v", "va1", "v1a")] == ["v", "va1", "v1a"]
    for digits in ("1234", "f" * 64):
        assert Ref.parse(f"team/sql@{digits}").digest == f"sha256:{digits}"
    for digits in ("123", "f" * 65, "12345G"):
        with pytest.raises(RefError, match="is not a digest"):
            Ref.parse(f"team/sql@{digits}")


def test_an_error_repeats_80_characters_of_a_long_text() -> None:
    for text in (
        "x" * 200,
        f"team/{'x' * 200}",
        f"team/sql:{'-' * 200}",
        f"team/sql:^{'x' * 200}",
        f"team/sql@{'x' * 200}",
        f"team/sql:v{'9' * 200}",
    ):
        with pytest.raises(RefError) as caught:
            Ref.parse(text)
        assert max(map(len, re.findall(r"\^?x+|-+|v9+", caught.value.what))) == 80
    with pytest.raises(RefError, match=rf"'\^{'x' * 79}' is a range of versions"):
        parse_tag(f"^{'x' * 200}", "team/sql")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (
            "http://127.0.0.1:8090/team/sql",
            "Write hub+http://127.0.0.1:8090/team/sql for a hub, or oci+http://127.0.0.1:8090/team/sql",
        ),
        ("https://hub.example/team/sql", "Write hub+https://hub.example/team/sql for a hub, or oci://hub.example/team/sql"),
    ],
)
def test_the_url_of_a_page_leads_to_the_addresses_that_it_may_mean(text: str, hint: str) -> None:
    with pytest.raises(RefError) as caught:
        Ref.parse(text)
    assert caught.value.hint.startswith(hint)
    for address in (word for word in caught.value.hint.split() if "://" in word):
        assert is_address(address)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("Team/SQL", "Write team/sql"), ("Ada Lovelace/x", "Write ada-lovelace/x"), ("team/..", "Use a-z and 0-9, with")],
)
def test_a_name_is_only_proposed_if_it_is_one(name: str, hint: str) -> None:
    with pytest.raises(RefError) as caught:
        Ref.parse(name)
    assert caught.value.hint.startswith(hint)

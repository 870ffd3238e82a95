"""Addresses of every kind of remote: what each names, and to whom it belongs."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub.remotes import remote_address
from adapterhub_converters.errors import UsageError


@pytest.mark.parametrize(
    ("text", "name", "namespace"),
    [
        ("oci://localhost:5000/team/sql:v1", "team/sql", "oci://localhost:5000/team"),
        ("hf://org/sql@main", "org/sql", "hf://org"),
        ("s3://bucket/team/sql:v1", "team/sql", "s3://bucket/team"),
        ("oci-archive:sql.tar", "sql", "oci-archive:sql.tar"),
        ("oci:layout:team/sql:v2", "team/sql", "oci:layout"),
    ],
)
def test_an_address_has_a_name_and_a_namespace(text: str, name: str, namespace: str) -> None:
    address = remote_address.parse(text)
    assert (remote_address.name_of(address), remote_address.namespace_of(address)) == (name, namespace)


@pytest.mark.parametrize("text", ["team/sql", "gopher://x/y", "", "user:secret@host/x"])
def test_what_is_no_address_is_refused_with_the_schemes_that_are(text: str) -> None:
    with pytest.raises(UsageError, match="not the address of a registry or a hub") as caught:
        remote_address.parse(text)
    assert "oci://" in caught.value.hint
    assert "secret" not in str(caught.value)


def test_a_folder_is_owned_by_itself_and_by_those_above(tmp_path: Path) -> None:
    owner = remote_address.owner_of(tmp_path / "team kit")
    assert owner == f"file://{tmp_path.resolve()}/team%20kit"
    assert remote_address.is_below(owner, tmp_path)
    assert remote_address.is_below(owner, tmp_path / "team kit")
    assert not remote_address.is_below(owner, tmp_path / "team")
    assert not remote_address.is_below("s3://bucket", tmp_path)

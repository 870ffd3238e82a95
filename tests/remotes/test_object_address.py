"""Addresses of object stores: what they name, and what is refused."""

from __future__ import annotations

import pytest

from adapterhub.remotes.objects.object_address import ObjectAddress
from adapterhub.remotes.remote_address import parse
from adapterhub_converters.errors import UsageError

pytestmark = pytest.mark.peer


@pytest.mark.parametrize(
    ("text", "store", "name", "reference"),
    [
        ("s3://bucket/team/sql", "s3://bucket", "team/sql", "latest"),
        ("s3://bucket/a/b/team/sql:prod", "s3://bucket/a/b", "team/sql", "prod"),
        ("S3://bucket/a/team/sql:v3", "s3://bucket/a", "team/sql", "v3"),
        ("gs://bucket/team/sql:^1.2", "gs://bucket", "team/sql", "^1.2"),
        ("az://box/team/sql@sha256:abcd", "az://box", "team/sql", "sha256:abcd"),
        ("file:///srv/a%20b:c/team/sql:prod", "file:///srv/a%20b%3Ac", "team/sql", "prod"),
    ],
)
def test_an_address_names_the_store_and_the_version(text: str, store: str, name: str, reference: str) -> None:
    address = ObjectAddress.parse(text)
    assert (address.store, address.ref.name, address.reference) == (store, name, reference)
    assert ObjectAddress.parse(str(address)) == address
    assert address.title == "sql"


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/sql",
        "s3:///team/sql",
        "s3://b/team/sql",
        "s3://bucket//team/sql",
        "s3://bucket/../team/sql",
        "s3://bucket/a%2fb/team/sql",
        "s3://bucket/team/SQL",
        "s3://bucket/team/sql:a b",
        "s3://bucket/team/sql:prod@sha256:abcd",
        "s3://bucket/team/sql?x=1",
        "file://host/srv/team/sql",
        "file:///team/sql",
        "file:///srv/../etc/team/sql",
        "file:///srv/%2e%2e/etc/team/sql",
        "file:///srv/%00/team/sql",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse(text)


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(UsageError) as caught:
        parse("s3://key:hunter2@bucket/team/sql")
    assert "hunter2" not in str(caught.value)

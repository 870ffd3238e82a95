"""Addresses in OCI registries: text and back, and what is refused."""

from __future__ import annotations

import pytest

from adapterhub.remotes.address_schemes import is_address
from adapterhub.remotes.oci.oci_address import OciAddress
from adapterhub_converters.errors import FormatError, UsageError
from tests.remotes.test_registry_client import PASSWORD


@pytest.mark.parametrize(
    ("text", "base", "reference"),
    [
        ("oci://registry.example/team/sql", "https://registry.example", "latest"),
        ("oci://registry.example:5000/team/sub/sql:v2", "https://registry.example:5000", "v2"),
        ("oci://registry.example/sql@sha256:" + "0" * 64, "https://registry.example", "sha256:" + "0" * 64),
        ("oci://127.0.0.1:5000/sql:x", "http://127.0.0.1:5000", "x"),
        ("oci://[::1]:5000/sql:x", "http://[::1]:5000", "x"),
        ("oci://localhost/sql", "http://localhost", "latest"),
        ("oci://127.0.0.1.example.org/sql", "https://127.0.0.1.example.org", "latest"),
        ("oci+http://in.house:5000/sql", "http://in.house:5000", "latest"),
        ("oci+https://localhost/sql", "https://localhost", "latest"),
        ("oci://docker.io/team/sql", "https://registry-1.docker.io", "latest"),
    ],
)
def test_an_address_has_host_and_version_and_round_trips_as_text(text: str, base: str, reference: str) -> None:
    address = OciAddress.parse(text)
    assert is_address(text)
    assert (address.registry_url, address.reference, str(address)) == (base, reference, text)


@pytest.mark.parametrize(
    "text",
    [
        "oci://", "oci://host", "oci://host/", "oci:///name", "oci://host/Name", "oci://host/../x", "oci://host/a//b",
        "oci://host/a:", "oci://host/a:-x", "oci://host/a:x@sha256:" + "0" * 64, "oci://host/a@sha256:12",
        "oci://ho st/a", "oci://host:port/a", "oci://host:99999/a", "oci://host/a?x=1", "oci://host/a#b", "oci://[::1/a",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises((UsageError, FormatError)):
        OciAddress.parse(text)


def test_credentials_in_an_address_are_refused_and_not_repeated() -> None:
    with pytest.raises(UsageError, match="end up in logs") as caught:
        OciAddress.parse(f"oci://user:{PASSWORD}@host/name")
    assert PASSWORD not in str(caught.value)

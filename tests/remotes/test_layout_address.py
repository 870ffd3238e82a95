"""Addresses of image layouts: what they name, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub.remotes import address_schemes, remote_address
from adapterhub.remotes.layouts import layout_address as layout
from adapterhub_converters.errors import UsageError
from tests.remotes.test_layout_archive import HEX


@pytest.mark.parametrize(
    ("text", "path", "name", "digest"),
    [
        ("layout://x.tar", "x.tar", None, None),
        ("layout:///a/b:v2", "/a/b", "v2", None),
        ("layout://b.tar:team/sql:v2", "b.tar", "team/sql:v2", None),
        (f"layout://b.tar@sha256:{HEX}", "b.tar", None, f"sha256:{HEX}"),
        ("oci:dir:v2", "dir", "v2", None),
        ("oci-archive:a/b.tar:team/sql:v2", "a/b.tar", "team/sql:v2", None),
        ("layout://C:\\x\\b.tar:v2", "C:\\x\\b.tar", "v2", None),
    ],
)
def test_an_address_has_path_and_name(text: str, path: str, name: str | None, digest: str | None) -> None:
    assert address_schemes.is_address(text)
    address = layout.parse(text)
    assert (address.path, address.tag, address.digest, str(address)) == (path, name, digest, text)


@pytest.mark.parametrize(
    "text", ["layout://", "oci:", "layout://x.tar:", f"layout://x:v1@sha256:{HEX}", "oci:x:a b", "layout://:v2", "oci:x:../y z"]
)
def test_an_address_of_nothing_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        layout.parse(text)


@pytest.mark.parametrize("text", ["oci://host/name:v1", "team/sql:v2", "./oci", "ocidir:v2", "https://host/x"])
def test_other_words_are_no_layout(text: str) -> None:
    assert not address_schemes.is_address(text) or isinstance(remote_address.parse(text), layout.LayoutAddress) is False


def test_a_folder_or_a_tar_is_recognized_by_prefix_content_or_name(tmp_path: Path) -> None:
    (tmp_path / "x.tar").mkdir()
    (tmp_path / "y").touch()
    kinds = {
        f"layout://{tmp_path}/new": False,
        f"layout://{tmp_path}/new.tar": True,
        f"layout://{tmp_path}/x.tar": False,
        f"layout://{tmp_path}/y": True,
        f"oci:{tmp_path}/new.tar": False,
        f"oci-archive:{tmp_path}/new": True,
    }
    assert {text: layout.parse(text).is_archive for text in kinds} == kinds

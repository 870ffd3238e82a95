"""Versions of adapter.json: drafts get today's names, a newer minor version loses unknown fields, a newer major is refused."""

from __future__ import annotations

from typing import Any

import pytest

from adapterhub.manifest import schema_versions
from adapterhub_converters.errors import FormatError, RefusedError

_NEWER = f"{schema_versions.MAJOR}.{schema_versions.MINOR + 1}"
_NEWER_ID = schema_versions.SCHEMA_ID.replace(schema_versions.CURRENT, _NEWER)


@pytest.mark.parametrize(
    ("document", "version"),
    [
        ({"schema_version": 2}, "2"),
        ({"schema_version": "1.0"}, "1.0"),
        ({}, ""),
        ({"schema_version": True}, ""),
        ({"schema_version": 1.5}, ""),
    ],
)
def test_a_version_is_a_text_or_an_integer(document: dict[str, Any], version: str) -> None:
    assert schema_versions.version_of(document) == version


@pytest.mark.parametrize("version", [3, "2.0", f"{schema_versions.MAJOR + 1}.0"])
def test_what_would_be_misread_is_refused(version: object) -> None:
    with pytest.raises(RefusedError, match="is newer than") as caught:
        schema_versions.check({"schema_version": version}, "adapter.json")
    assert caught.value.code == "newer-version"


def test_a_newer_minor_version_names_its_own_schema_and_loses_what_is_unknown() -> None:
    with pytest.raises(FormatError, match="was expected"):
        schema_versions.check({"schema_version": _NEWER, "$schema": schema_versions.SCHEMA_ID}, "adapter.json")
    document = {"schema_version": _NEWER, "$schema": _NEWER_ID, "r": 8, "later": 1, "base": {"repo": "org/base", "later": 2}}
    schema_versions.check(document, "adapter.json")
    assert schema_versions.upgrade(document) == {
        "schema_version": schema_versions.CURRENT,
        "$schema": schema_versions.SCHEMA_ID,
        "r": 8,
        "base": {"repo": "org/base"},
    }


def test_drafts_get_the_names_and_values_of_today() -> None:
    draft: dict[str, Any] = {
        "schema_version": 1,
        "licence": "mit",  # codespell:ignore
        "base": {"quantisation": "nf4"},  # codespell:ignore
        "recipe": {"method": "cat", "base": None},
    }
    assert schema_versions.upgrade(draft) == {
        "schema_version": schema_versions.CURRENT,
        "license": "mit",
        "base": {"quantization": "nf4"},
        "recipe": {"rank": None, "method": "cat"},
    }
    assert schema_versions.upgrade({"schema_version": "1", "r": 8}) == {"schema_version": "1", "r": 8}  # text is no draft

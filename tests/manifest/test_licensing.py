"""Licenses as SPDX expressions: as they are recorded, as a policy permits them, and combined with their reasons."""

from __future__ import annotations

import pytest

from adapterhub.manifest import licensing
from adapterhub.manifest.licensing import LicensedPart


@pytest.mark.parametrize(
    ("license_text", "expected"),
    [
        ("apache-2.0", "Apache-2.0"),
        ("MIT OR Apache-2.0", "MIT OR Apache-2.0"),
        ("(mit and bsd-3-clause) or gpl-3.0", "(MIT AND BSD-3-Clause) OR GPL-3.0-only"),
        ("llama3.1", "LicenseRef-llama3.1"),
        ("LicenseRef-mine", "LicenseRef-mine"),
        ("other", ""),
        ("", ""),
        (None, ""),
        ("<script>", "LicenseRef-script"),
        ("mit) or (0bsd", "LicenseRef-mit-or-0bsd"),
        ("MIT Apache-2.0", "LicenseRef-MIT-Apache-2.0"),
        ("((", ""),
        ("Apache-2.0 WITH LLVM-exception", "Apache-2.0 WITH LLVM-exception"),
        ("MIT WITH foo", "LicenseRef-MIT-WITH-foo"),
        ("GPL-2.0+", "GPL-2.0-or-later"),
        ("Apache-2.0+", "Apache-2.0+"),
        ("odc-by", "ODC-By-1.0"),
        ("LicenseRef-a:b", "LicenseRef-a-b"),
    ],
)
def test_a_license_is_written_as_spdx_does(license_text: str | None, expected: str) -> None:
    assert licensing.expression(license_text) == expected


_HUB_LICENSES = (  # ids of the Hub's list that SPDX has too
    "bsd-3-clause-clear", "cc-by-2.0", "cc-by-2.5", "cc-by-nc-nd-3.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cdla-sharing-1.0",
    "cdla-permissive-1.0", "ecl-2.0", "epl-1.0", "etalab-2.0", "eupl-1.1", "lgpl-2.1", "lppl-1.3c", "osl-3.0", "postgresql",
    "ncsa",
)  # fmt: skip


@pytest.mark.parametrize("license_", _HUB_LICENSES)
def test_a_license_of_the_hub_that_spdx_lists_is_written_as_spdx_does(license_: str) -> None:
    assert licensing.expression(license_).lower().removesuffix("-only") == license_


@pytest.mark.parametrize(
    ("license_", "allowed", "permitted"),
    [
        ("MIT OR Apache-2.0", ["mit"], True),
        ("(MIT)", ["MIT"], True),
        ("MIT AND Apache-2.0", ["MIT"], False),
        ("MIT AND Apache-2.0", ["MIT", "apache-2.0"], True),
        ("(MIT AND GPL-3.0) OR 0BSD", ["0BSD"], True),
        ("GPL-2.0-or-later", ["GPL-2.0-only"], True),
        ("GPL-2.0-only", ["GPL-2.0-or-later"], False),
        ("Apache-2.0 WITH LLVM-exception", ["Apache-2.0"], False),
        ("mit) OR (0bsd", ["MIT"], False),
        ("llama3.1", ["Llama3.1"], True),
        ("other", ["Other"], True),
        (None, ["MIT"], False),
    ],
)
def test_a_policy_permits_one_side_of_each_or_and_both_of_each_and(
    license_: str | None, allowed: list[str], permitted: bool
) -> None:
    assert licensing.permits(license_, allowed) is permitted


def test_a_choice_stays_one_where_licenses_are_joined_and_a_missing_one_is_named() -> None:
    parts = [
        LicensedPart("adapter", "a", "mit or apache-2.0"),
        LicensedPart("base", "b", "gemma"),
        LicensedPart("parent", "c", None),
    ]
    combined = licensing.combine(parts)
    assert combined.expression == "(MIT OR Apache-2.0) AND LicenseRef-gemma"
    assert combined.missing == ("parent c",)
    assert any("no license is recorded" in reason for reason in combined.reasons)

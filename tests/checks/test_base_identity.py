"""The base that an adapter was trained on is told from another by what adapter.json pins."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from adapterhub import checks
from adapterhub.manifest import derive
from tests.checks.test_checks import codes
from tests.support.folders import adapter, base, pairs


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, None),
        ({"fingerprint": "sha256:" + "0" * 64}, "base-differs"),
        ({"tokenizer_digest": "sha256:" + "0" * 64}, "tokenizer-differs"),
        ({"config": {"rope_theta": 5e5}}, "numerics-differ"),
        ({"config": {"rope_theta": 10000.0001}}, None),
        ({"repo": "org/another"}, "base-name-differs"),
    ],
)
def test_the_very_base(tmp_path: Path, changes: dict[str, object], code: str | None) -> None:
    spec, folder = base(tmp_path / "b"), adapter(tmp_path / "a", pairs(2))
    spec = dataclasses.replace(spec, repo="org/model", tokenizer_digest="sha256:" + "1" * 64)
    manifest = derive.describe(folder, base=spec)
    dataclasses.replace(manifest, base=dataclasses.replace(manifest.base, **changes)).write(folder)  # type: ignore[arg-type]
    report = checks.check(folder, base=spec)
    assert "unpinned" not in {problem.code for problem in report.problems}
    assert codes(report) == ({code} if code else set())

"""Every causal family that transformers builds: half a minute of imports."""

from __future__ import annotations

from pathlib import Path

from tests.checks.test_causal_families import DIVIDED, errors_of


def test_no_family_has_a_false_error(tmp_path: Path) -> None:
    errors = errors_of(slice(None), tmp_path)
    assert len(errors) >= 90
    assert {family for family, codes in errors.items() if codes} <= DIVIDED

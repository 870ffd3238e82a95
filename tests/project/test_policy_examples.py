"""The policies of a bank in `examples/policies`: each lets through an adapter that meets it, and refuses one that does not."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

import pytest

from adapterhub.manifest.document import AdapterManifest
from adapterhub.project import settings_file
from adapterhub.project.policy_rules import VersionFacts
from tests.conftest import ROOT

FOLDER = ROOT / "examples" / "policies"
WEIGHTS = [{"path": "model.safetensors", "digest": "sha256:" + "1" * 64, "size": 1}]
GOOD: Mapping[str, Any] = {
    "license": "MIT OR GPL-3.0-only",
    "r": 16,
    "base": {"repo": "Qwen/Qwen3-0.6B", "revision": "c1899de289a04d12100db370d81485cdf75e47ca"},
    "expires": "2027-01-01",
    "training": {
        "recorder": "trainer",
        "created": "2026-06-01T00:00:00Z",
        "data": [{"name": "bank/letters", "license": "CC-BY-4.0"}],
        "weights": WEIGHTS,
    },
}
NOW = datetime.datetime(2026, 12, 1, tzinfo=datetime.UTC)
# What an adapter of somebody else has, and the rule that it does not meet; of the others, the rule about who must have signed.
REFUSED: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "bases": ({"base": {"repo": "evil/Qwen3-0.6B"}}, "base_models"),
    "data": ({"training": {"data": [{"name": "web/crawl"}]}}, "data"),
    "expiry": ({"training": {"created": "2025-01-01T00:00:00Z"}}, "max_age"),
    "licenses": ({"training": {"data": [{"name": "bank/letters", "license": "CC-BY-NC-4.0"}]}}, "license_parts"),
    "max-rank": ({"r": 128}, "max_rank"),
    "scanned": ({}, "scan"),
    "trained-here": ({"training": {"recorder": "owner"}}, "recorders"),
}
SIGNED = {
    "bases": "attestations.*.training",
    "evaluated": "evaluations.exact_match",
    "signed-by-the-team": "signers.*",
    "trained-here": "attestations.*.training",
    "two-people": "signers.*",
}


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.toml")))
def test_a_policy_of_the_bank_allows_what_meets_it_and_nothing_else(name: str) -> None:
    policy = settings_file.read(FOLDER / f"{name}.toml").policy
    good, clean = AdapterManifest.salvage(GOOD), VersionFacts(find_problem=lambda: "", now=NOW)
    policy.check_manifest(good, "bank/letters", clean)
    assert name in REFUSED or name in SIGNED
    if name in REFUSED:
        changes, rule = REFUSED[name]
        facts = VersionFacts(find_problem=lambda: "pickle: weights.bin", now=NOW) if name == "scanned" else clean
        checks = policy.manifest_checks(AdapterManifest.salvage({**GOOD, **changes}), facts)
        assert rule in {check.rule for check in checks if check.problem}
    assert {rule.rule for rule in policy.signing_rules("bank/letters")} == ({SIGNED[name]} if name in SIGNED else set())


def test_there_are_the_ten_that_a_bank_has_asked_for() -> None:
    assert len([*FOLDER.glob("*.toml")]) == 10

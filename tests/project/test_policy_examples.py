"""The policies of a bank in `examples/policies`: each lets through an adapter that meets it, and refuses one that does not."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import adapterhub as ah
from adapterhub.manifest import derive
from adapterhub.manifest.document import TRAINER, AdapterManifest, FileEntry, Training, TrainingData
from adapterhub.manifest.measurement import Evaluation
from adapterhub.operations import attest, policy_report
from adapterhub.operations.attest_results import attest_results
from adapterhub.operations.workspace import Workspace
from adapterhub.project import settings_file
from adapterhub.project.policy_rules import VersionFacts
from adapterhub.trust import keys
from adapterhub_converters.errors import RefusedError
from tests.conftest import ROOT
from tests.support.adapters import write_adapter, write_large_adapter

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


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with an adapter of the bank and one of somebody else, the policies, and the keys that they name."""
    root = tmp_path_factory.mktemp("bank")
    shutil.copytree(FOLDER, root / "policies")
    for name in ("trainer", "ci", "team", "eva", "ana/a", "ben/b"):
        (root / "policies" / "keys" / name).parent.mkdir(parents=True, exist_ok=True)
        keys.generate(root / "policies" / "keys" / name)
    with ah.Registry(root):
        workspace = Workspace(registry=root, policy=None)
    _push_good(root, workspace)
    stranger = write_large_adapter(root / "stranger", layers=1)
    (stranger / "README.md").write_text("# SQL\n<script>alert(1)</script>\n")
    (stranger / "adapter.toml").write_text('license = "GPL-3.0-only"\n[training]\ndata = [{name = "web/crawl"}]\n')
    ah.push(stranger, "bank/stranger", workspace=workspace)
    return root


def _push_good(root: Path, workspace: Workspace) -> None:
    """Push an adapter that the trainer trained and signed, which was evaluated, and which people signed."""
    folder = write_adapter(root / "letters", base_model_name_or_path="Qwen/Qwen3-0.6B", revision=GOOD["base"]["revision"])
    training = Training(
        config={"train": {"steps": 3}},
        data=(TrainingData(name="bank/letters", digest="sha256:" + "3" * 64, license="CC-BY-4.0"),),
        weights=(FileEntry("model.safetensors", "sha256:" + "1" * 64, 1),),
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        recorder=TRAINER,
    )
    derive.describe(folder, training=training, declared={"license": "MIT", "expires": "2999-01-01"}).write(folder)
    digest = ah.push(folder, "bank/letters", workspace=workspace).digest
    signers = {name: keys.read_private(root / "policies" / "keys" / f"{name}.key") for name in ("trainer", "ci")}
    statement = attest.trained(folder, "bank/letters")
    attest.add(statement, statement.sign(signers["trainer"]), "bank/letters", signers["trainer"], workspace)
    evaluation = Evaluation("letters", {"exact_match": 0.8}, data=({"path": "rows", "digest": "sha256:" + "2" * 64},))
    attest_results("bank/letters", [evaluation], signers["ci"], digest=digest, ok=True, workspace=workspace)
    for name in ("team", "ana/a", "ben/b"):
        ah.sign("bank/letters", root / "policies" / "keys" / f"{name}.key", workspace=workspace)


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.toml")))
def test_a_pull_under_a_policy_of_the_bank_gets_its_adapter_and_no_other(bank: Path, tmp_path: Path, name: str) -> None:
    policy = settings_file.read(bank / "policies" / f"{name}.toml").policy
    workspace = Workspace(registry=bank, policy=policy)
    assert policy_report.report("bank/letters", workspace).violations == []
    ah.pull("bank/letters", tmp_path / "letters", workspace=workspace)
    assert policy_report.report("bank/stranger", workspace).violations
    with pytest.raises(RefusedError, match="against the policy of "):
        ah.pull("bank/stranger", tmp_path / "stranger", workspace=workspace)

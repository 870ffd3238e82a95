"""`policy check`, and the rules about signers and files: what is signed and scanned counts, what is typed does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapterhub.manifest.measurement import Evaluation
from adapterhub.operations.attest_results import attest_results
from adapterhub.operations.workspace import Workspace
from adapterhub.trust import keys
from tests.conftest import Run
from tests.support.adapters import Make

DIGEST = "sha256:" + "1" * 64
PEOPLE = '[policy.signers]\n"team/*" = { of = ["ana", "ben.pub", "eva.pub"], at_least = 2 }\n'


@pytest.fixture(autouse=True)
def _working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """Keys of three people, of whom Ana has two."""
    (tmp_path / "ana").mkdir()
    for name in ("ana/old", "ana/new", "ben", "eva"):
        keys.generate(tmp_path / name)
    return tmp_path


def rules(text: str) -> None:
    Path("adapterhub.toml").write_text(text)


def failed(run: Run, ref: str = "team/sql") -> dict[str, Any]:
    """The rules that a version does not meet, with the problems."""
    report = json.loads(run("policy", "check", ref, "--json", code=6).stdout)
    return {rule["rule"]: rule["problem"] for rule in report["rules"] if not rule["ok"]}


def test_two_keys_of_one_person_do_not_sign_for_two(run: Run, make: Make, people: Path) -> None:
    run("push", make("sql"), "team/sql")
    for key in ("ana/old.key", "ana/new.key"):
        run("sign", "team/sql", "--key", key)
    rules(PEOPLE)
    assert failed(run) == {"signers.team/*": "is signed by 1 of the 2 people who must sign it"}
    assert "signed by 1 of the 2" in run("pull", "team/sql", "-o", "out", code=6).stderr
    run("sign", "team/sql", "--key", "eva.key")
    run("pull", "team/sql", "-o", "out")
    # A key that is listed twice is one person's.
    rules(PEOPLE.replace('"ana"', '"ana/old.pub"').replace('"ben.pub"', '"./ana/old.pub"').replace('"eva.pub"', '"ben.pub"'))
    assert "signed by 1 of the 2" in run("pull", "team/sql", "-o", "again", code=6).stderr


def test_an_attested_result_counts_and_a_declared_one_does_not(run: Run, make: Make, people: Path) -> None:
    folder = make("sql")
    (folder / "adapter.toml").write_text('[[evaluations]]\nmetric = "bleu"\nvalue = 99\n')
    pushed = json.loads(run("push", folder, "team/sql", "--json").stdout)
    rules(f'[policy.evaluations.bleu]\nmin = 20\ndata = ["{DIGEST}"]\nsigners = ["ben.pub"]\n')
    assert "no attestation 'tests'" in failed(run)["evaluations.bleu"]
    for bleu, digest, signer, problem in (
        (30, DIGEST, "eva.key", "which is not accepted"),
        (10, DIGEST, "ben.key", "the attested bleu 10 is below 20"),
        (30, DIGEST.replace("1", "2"), "ben.key", "measured on other data"),
        (30, DIGEST, "ben.key", ""),
    ):
        evaluation = Evaluation("test", {"bleu": bleu}, data=({"path": "rows", "digest": digest},))
        key, workspace = keys.read_private(people / signer), Workspace(registry=people / "xdg" / "adapterhub", policy=None)
        attest_results("team/sql", [evaluation], key, digest=pushed["digest"], ok=True, workspace=workspace)
        if problem:
            assert problem in failed(run)["evaluations.bleu"]
    assert "meets 1 rule" in run("policy", "check", "team/sql").stdout


def test_weights_written_by_hand_are_not_those_that_were_attested(run: Run, make: Make, people: Path) -> None:
    folder = make("sql")
    record = '[base]\nrepo = "org/m"\n[training]\nweights = [{{ path = "m.safetensors", digest = "{}", size = 1 }}]\n'
    record += 'config = {{ a = 1 }}\ndata = [{{ path = "rows", digest = "{}" }}]\n'
    (folder / "adapter.toml").write_text(record.format(DIGEST, DIGEST))
    run("push", folder, "team/sql")
    rules(f'[policy.base_models."org/m"]\nweights = ["{DIGEST}"]\n[policy.attestations."*"]\ntraining = ["ben.pub"]\n')
    assert "no attestation 'training'" in failed(run)["attestations.*.training"]
    # Nor does a claim about other weights count, whoever signed it.
    rules(Path("adapterhub.toml").read_text().replace(DIGEST, DIGEST.replace("1", "2")))
    run("attest", "team/sql", "--training", "--builder", "https://ci.example", "--key", "ben.key")
    assert "org/m with other weights" in failed(run)["attestations.*.training"]
    assert "org/m with other weights" in failed(run)["base_models"]
    rules(Path("adapterhub.toml").read_text().replace(DIGEST.replace("1", "2"), DIGEST))
    run("policy", "check", "team/sql")


@pytest.mark.parametrize("source", ["team/sql", "layout://layout:team/sql:v1"])
def test_what_a_scan_finds_is_refused_wherever_it_is(run: Run, make: Make, source: str) -> None:
    folder = make("sql")
    run("push", folder, "team/clean")
    (folder / "README.md").write_text("# SQL\n<script>alert(1)</script>\n")
    run("push", folder, "team/sql")
    run("copy", "team/sql", "layout://layout:team/sql:v1")
    rules('[policy]\nscan = "clean"\n')
    run("pull", "team/clean", "-o", "clean")
    assert "scan: " in run("pull", source, "-o", "out", code=6).stderr
    assert failed(run, source) == {"scan": "active-markup: README.md"}
    assert "scan: " in run("push", folder, "team/new", code=6).stderr


def test_every_rule_is_listed_with_the_value_and_no_policy_is_said(run: Run, make: Make) -> None:
    run("push", make("sql"), "team/sql")
    assert run("policy", "check", "team/sql").stdout == "team/sql:v1: no policy applies\n"
    rules('[policy]\nallow = ["team/*"]\nmax_rank = 1\nformats = ["peft"]\n')
    lines = [line.split() for line in run("policy", "check", "team/sql", code=6).stdout.splitlines()]
    assert ["ok", "allow", "team/sql"] in lines
    assert ["ok", "formats", "peft"] in lines
    assert ["NO", "max_rank", "rank", "2", "rank", "2", "is", "over", "1"] in lines
    assert "is a folder" in run("policy", "check", "./sql", code=2).stderr


def test_a_way_into_another_name_is_asked_of_that_name(run: Run, make: Make, people: Path) -> None:
    run("push", make("sql"), "team/sql")
    rules(
        '[policy]\nallow = ["team/*", "release/*", "layout://*"]\nmax_rank = 8\n[policy.signers]\n"release/*" = ["ben.pub"]\n'
    )
    for way in ("pull", "merge", "serve"):
        assert rule_names(run, "--way", way) == {"allow": True, "max_rank": True}
    to_release = ("--way", "copy", "--target", "release/sql:v1")
    assert rule_names(run, *to_release, code=6) == {"allow": True, "max_rank": True, "signers.release/*": False}
    assert "signers.release/*: " in run("copy", "team/sql", "release/sql", code=6).stderr
    assert rule_names(run, "--way", "copy", "--target", "other/sql", code=6)["allow"] is False
    # Whoever reads at an address asks for signatures there.
    assert rule_names(run, "--way", "push", "--target", "layout://out:v1") == {"allow": True, "max_rank": True}
    assert "keeps the name. Leave it out" in run("policy", "check", "team/sql", "--target", "release/sql", code=2).stderr


def rule_names(run: Run, *options: str, code: int = 0) -> dict[str, bool]:
    """The rules that a way asks of team/sql, and whether each is met."""
    report = json.loads(run("policy", "check", "team/sql", *options, "--json", code=code).stdout)
    assert report["way"] == options[1]
    return {rule["rule"]: rule["ok"] for rule in report["rules"]}

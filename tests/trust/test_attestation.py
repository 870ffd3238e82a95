"""Attestations: computed before they are signed, verified, computed again, carried with a version, and required by a policy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterhub as ah
from adapterhub.digest import sha256_file
from adapterhub.manifest import derive
from adapterhub.manifest.document import AdapterManifest, FileEntry, Training, TrainingData
from adapterhub.operations.workspace import Workspace
from adapterhub.trust import attestation, bundle, keys
from adapterhub.trust.attestation import Attestation
from adapterhub_converters import bases
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.containers.safetensors_file import SafetensorsFile
from adapterhub_converters.errors import IntegrityError, ParameterError, RefusedError, UsageError
from tests.conftest import Run
from tests.registry.test_packaging import write_base
from tests.support.adapters import write_adapter

KEY, PUBLIC = ("--key", "ci.key"), ("--key", "ci.pub")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, a registry with two adapters that were trained on it, their merge, and the keys of a team and of its CI."""
    monkeypatch.chdir(tmp_path)
    for name in ("ci", "team", "other"):
        keys.generate(tmp_path / name)
    write_base_of(tmp_path / "base", 10000.0)
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    spec = bases.read_hf(tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    training = Training(
        config={"train": {"steps": 3}},
        data=(TrainingData(path="train.jsonl", digest=sha256_file(tmp_path / "train.jsonl"), documents=1),),
        weights=(FileEntry(weights.name, sha256_file(weights), weights.stat().st_size),),
        seed=7,
        versions={"torch": "2.8.0"},
        created="2026-01-31T12:00:00Z",
        recorder="trainer",
    )
    with ah.Registry(".") as registry:
        for seed, name in enumerate(("sql", "french")):
            folder = write_adapter(tmp_path / name, seed)
            derive.describe(folder, base=spec, training=training).write(folder)
            registry.push(folder, f"team/{name}")
        ah.merge(["team/sql", "team/french"], "team/both:v1-merged", method="linear", workspace=registry.workspace)
    return tmp_path


@pytest.fixture
def workspace(place: Path) -> Workspace:
    return Workspace(registry=place, policy=None)


def write_base_of(folder: Path, theta: float) -> None:
    """A base whose function depends on a number in its config."""
    write_base(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": theta}))


def predicate(run: Run, ref: str, *options: object) -> Any:
    (attestation_document,) = json.loads(run("verify", ref, "--attestations", *PUBLIC, *options, "--json").stdout)[
        "attestations"
    ]
    return attestation_document["predicate"]


def test_what_fits_is_attested_with_the_verdict_of_each_runtime_and_computed_again(place: Path, run: Run) -> None:
    run("attest", "team/sql", "--fits", "base", *KEY)
    predicate_document = predicate(run, "team/sql", "--recompute", "--base", "base")
    assert predicate_document["base"]["fingerprint"] == bases.read_hf(place / "base").fingerprint
    assert predicate_document["verdicts"]["vllm"]["verdict"] == "applied"
    result = run("verify", "team/sql", "--attestations", *PUBLIC, "--recompute", code=1)
    assert "cannot be computed again without the base" in result.stdout
    assert "Pass it as --base" in result.stdout


def test_what_does_not_fit_is_not_attested(place: Path, run: Run, workspace: Workspace) -> None:
    write_base_of(place / "other-base", 5.0)
    with pytest.raises(RefusedError, match="numerics-differ"):
        ah.attest("team/sql", "ci.key", fits="other-base", training=True, workspace=workspace)
    assert "has no attestation" in run("verify", "team/sql", "--attestations", *PUBLIC, code=1).stdout  # not of training either


def test_another_base_gives_another_statement(place: Path, run: Run, workspace: Workspace) -> None:
    ah.push(write_adapter(place / "unpinned", 3), "team/unpinned", workspace=workspace)
    ah.attest("team/unpinned", "ci.key", fits="base", workspace=workspace)
    write_base_of(place / "other-base", 5.0)
    words = ("verify", "team/unpinned", "--attestations", *PUBLIC, "--recompute", "--base", "other-base")
    assert "fits: is another statement when it is computed again: base.config.rope_theta" in run(*words, code=1).stdout


def test_a_merge_is_attested_if_a_rebuild_gives_its_bytes_and_its_parents_are_signed(
    place: Path, run: Run, workspace: Workspace
) -> None:
    with pytest.raises(IntegrityError, match="team/sql:v1: is not signed"):
        ah.attest("team/both", "ci.key", merge=True, workspace=workspace)
    signed = [ah.sign(f"team/{name}", "team.key", workspace=workspace) for name in ("sql", "french")]
    with pytest.raises(IntegrityError, match="which is not accepted"):
        ah.attest("team/both", "ci.key", merge=True, workspace=workspace)
    (merge_attestation,) = ah.attest("team/both", "ci.key", merge=True, parents="team.pub", workspace=workspace)
    assert merge_attestation.predicate["recipe"]["method"] == "linear"
    assert [parent["signer"] for parent in merge_attestation.predicate["parents"]] == [parent.signer.id for parent in signed]
    assert predicate(run, "team/both", "--recompute", "--parent-key", "team.pub") == json.loads(
        json.dumps(merge_attestation.predicate)
    )
    run("verify", "team/both", "--attestations", *PUBLIC, "--recompute", "--parent-key", "other.pub", code=1)
    with pytest.raises(RefusedError, match="no recipe to make it from"):
        ah.attest("team/sql", "ci.key", merge=True, workspace=workspace)


def test_a_training_is_attested_as_slsa_provenance(place: Path, run: Run, workspace: Workspace) -> None:
    run("attest", "team/sql", "--training", "--builder", "https://ci.example/gpu", *KEY)
    inputs = ("--recompute", "--base", "base", "--data", "train.jsonl")
    predicate_document = predicate(run, "team/sql", *inputs)
    build, details = predicate_document["buildDefinition"], predicate_document["runDetails"]
    assert build["externalParameters"] == {"config": {"train": {"steps": 3}}}
    assert [(dependency["name"], dependency["annotations"]["role"]) for dependency in build["resolvedDependencies"]] == [
        ("org/base", "base"), ("model.safetensors", "base"), ("train.jsonl", "data"),
    ]  # fmt: skip
    assert details["builder"] == {"id": "https://ci.example/gpu", "version": {"torch": "2.8.0"}}
    assert details["metadata"] == {"finishedOn": "2026-01-31T12:00:00Z"}
    run("verify", "team/sql", "--attestations", *PUBLIC, "--recompute")  # from adapter.json alone
    (place / "train.jsonl").write_text('{"text": "b"}\n')
    result = run("verify", "team/sql", "--attestations", *PUBLIC, *inputs, code=1)
    assert "train.jsonl is not among its data" in result.stdout
    with pytest.raises(RefusedError, match="has no record of a training"):
        ah.attest("team/both", "ci.key", training=True, workspace=workspace)


def test_what_was_compared_of_a_training_is_said_and_that_it_was_not_repeated(place: Path, run: Run) -> None:
    run("attest", "team/sql", "--training", *KEY)
    words = ("verify", "team/sql", "--attestations", *PUBLIC, "--recompute")
    whole = run(*words, "--base", "base", "--data", "train.jsonl").stdout
    assert "training attested by ci.pub (inputs compared, training not repeated)" in whole
    assert "computed again" not in whole
    assert "(its record compared, training not repeated)" in run(*words).stdout


@pytest.fixture
def forged(place: Path, workspace: Workspace) -> str:
    """Weights that nobody trained, with a training that their owner wrote by hand: with true digests of a base and of data."""
    folder = write_adapter(place / "forged", 5)
    weights = place / "base" / "model.safetensors"
    (folder / "adapter.toml").write_text(f"""
[training]
config = {{train = {{steps = 3}}}}
data = [{{path = "train.jsonl", digest = "{sha256_file(place / "train.jsonl")}"}}]
weights = [{{path = "model.safetensors", digest = "{sha256_file(weights)}", size = {weights.stat().st_size}}}]
""")
    ah.push(folder, "team/forged", workspace=workspace)
    return "team/forged"


def test_a_declared_training_is_not_attested_as_one_by_our_trainer(forged: str, workspace: Workspace, run: Run) -> None:
    with pytest.raises(RefusedError, match="its training was recorded by owner, and not by adapterhub's trainer") as caught:
        ah.attest(forged, "ci.key", training=True, workspace=workspace)
    assert caught.value.code == "other-recorder"
    ah.attest(forged, "ci.key", training=True, builder="https://ci.example/gpu", workspace=workspace)
    assert predicate(run, forged)["runDetails"]["builder"]["id"] == "https://ci.example/gpu"


def test_the_trainer_is_named_by_itself_alone_and_a_policy_can_ask_for_that(
    place: Path, workspace: Workspace, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(RefusedError, match="is named only in what the trainer signs itself") as caught:
        ah.attest("team/sql", "ci.key", training=True, builder="urn:adapterhub:trainer", workspace=workspace)
    assert caught.value.code == "other-builder"
    ah.attest("team/sql", "ci.key", training=True, workspace=workspace)
    assert predicate(run, "team/sql")["runDetails"]["builder"]["id"] == "urn:adapterhub:record"
    text = '[policy]\nbuilders = ["{}"]\n[policy.attestations."*"]\ntraining = ["ci.pub"]\n'
    (place / "adapterhub.toml").write_text(text.format("urn:adapterhub:trainer"))
    problem = "names the builder urn:adapterhub:record, which is not allowed"
    assert problem in run("pull", "team/sql", "-o", "out", code=6).stderr
    (place / "adapterhub.toml").write_text(text.format("urn:adapterhub:record"))
    run("pull", "team/sql", "-o", "out")


def test_a_provenance_that_names_our_trainer_for_a_declared_training_is_refused(
    forged: str, workspace: Workspace, run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an earlier version, which did not ask for the recorder, signed it."""
    monkeypatch.setattr("adapterhub.operations.attest_predicates.TRAINER", "owner")
    ah.attest(forged, "ci.key", training=True, workspace=workspace)
    monkeypatch.undo()
    monkeypatch.chdir(place)
    result = run("verify", forged, "--attestations", *PUBLIC, "--recompute", code=1)
    assert "training: cannot be computed again: its training was recorded by owner" in result.stdout


@pytest.mark.parametrize("log", [None, [], [{"logIndex": "1"}]])
def test_a_bundle_as_cosign_writes_it_is_verified_with_the_same_keys(tmp_path: Path, log: list[dict[str, str]] | None) -> None:
    """cosign names a key by its DER, leaves out an empty log, and writes an earlier type of statement of equal meaning."""
    keys.generate(tmp_path / "ci")
    key = keys.read_private(tmp_path / "ci.key")
    claim = Attestation("https://example.com/scan", "team/sql", "sha256:" + "a" * 64, {"clean": True})
    statement = {**json.loads(claim.dump()), "_type": "https://in-toto.io/Statement/v0.1"}
    signed = json.loads(bundle.sign_payload(json.dumps(statement).encode(), key, "x"))
    material = {"publicKey": {"hint": key.public.hints[1]}, **({} if log is None else {"tlogEntries": log})}
    raw = json.dumps({**signed, "verificationMaterial": material}).encode()
    assert attestation.verify(raw, [key.public], "x").attestation == claim
    other_key = keys.generate(tmp_path / "other")[1]
    with pytest.raises(IntegrityError, match="which is not accepted"):
        attestation.verify(raw, [other_key], "x")


def test_a_clean_scan_is_attested_and_computed_again(place: Path, run: Run) -> None:
    run("attest", "team/sql", "--scan", *KEY)
    claim = predicate(run, "team/sql", "--recompute")
    assert (claim["result"], claim["scanner"]["name"]) == ("PASSED", "adapterhub")
    assert [problem["severity"] for problem in claim["problems"] if problem["severity"] == "error"] == []


def test_a_scan_with_an_error_is_not_attested(place: Path, run: Run) -> None:
    folder = write_adapter(place / "bad", 5)
    (folder / "readme.txt").write_text("a text that ends the other way \u202e\n")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "auto_mapping": {"base_model_class": "X", "parent_library": "evil"}})
    )
    run("push", folder, "team/bad", "--force")
    errors = [problem for problem in ah.scan(folder).report.problems if problem.severity == "error"]
    assert errors
    assert "its scan is not clean" in run("attest", "team/bad", "--scan", *KEY, code=6).stderr
    assert "has no attestation" in run("verify", "team/bad", "--attestations", *PUBLIC, code=1).stdout


def test_a_bill_is_attested_as_cyclonedx_and_computed_again_under_any_name(place: Path, run: Run) -> None:
    run("attest", "team/sql", "--bill", "--base-license", "apache-2.0", *KEY)
    bill = predicate(run, "team/sql", "--recompute")
    assert (bill["bomFormat"], bill["metadata"]["component"]["name"]) == ("CycloneDX", "sql")
    base = bill["metadata"]["component"]["pedigree"]["ancestors"][0]
    assert base["licenses"] == [{"expression": "Apache-2.0"}]
    run("push", "team/sql", "layout://x:other/text2sql:v1")
    predicate(run, "layout://x:other/text2sql:v1", "--recompute")
    (place / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    result = run("verify", "team/sql", "--attestations", *PUBLIC, "--recompute", "--base", "base", code=1)
    assert "bill: is another statement when it is computed again: metadata.component" in result.stdout
    run("attest", "team/sql", "--bill", "--fits", "base", "--key", "team.key")
    run("verify", "team/sql", "--attestations", "--key", "team.pub", "--recompute", "--base", "base")


@pytest.mark.parametrize("kind", ["scan", "bill"])
def test_a_policy_asks_for_a_scan_and_a_bill(place: Path, run: Run, kind: str) -> None:
    (place / "adapterhub.toml").write_text(f'[policy.attestations."team/*"]\n{kind} = ["ci.pub"]\n')
    assert f"has no attestation '{kind}'" in run("pull", "team/sql", "-o", "out", code=6).stderr
    run("attest", "team/sql", f"--{kind}", *KEY)
    run("pull", "team/sql", "-o", "out")


@pytest.mark.parametrize("bill", [{}, {"metadata": 1}, {"metadata": {"component": {"pedigree": {"ancestors": [1]}}}}])
def test_a_bill_without_a_license_of_the_base_has_none(bill: dict[str, Any]) -> None:
    assert attestation.billed(Attestation(attestation.TYPES["bill"], "x", "sha256:" + "a" * 64, bill)) == ("", None)


def test_statements_name_the_base_by_a_package_url(place: Path, run: Run, workspace: Workspace) -> None:
    folder = write_adapter(place / "named", 8)
    spec = bases.read_hf(place / "base")
    training = AdapterManifest.read(place / "sql").training
    assert training is not None
    with ah.Registry(".") as registry:
        derive.describe(folder, base=spec, training=dataclasses.replace(training, created=None)).write(folder)
        registry.push(folder, "team/named")
    ah.attest("team/named", "ci.key", training=True, workspace=workspace)
    claim = predicate(run, "team/named", "--recompute")
    dependencies = claim["buildDefinition"]["resolvedDependencies"]
    assert [item["uri"] for item in dependencies if "uri" in item] == ["pkg:huggingface/org/base"]
    assert any("digest" in item for item in dependencies if item["annotations"]["role"] == "base")
    assert claim["runDetails"]["metadata"] == {}  # and no finishedOn: null


def test_attestations_travel_with_the_version(place: Path, run: Run) -> None:
    run("attest", "team/sql", "--training", *KEY)
    run("push", "team/sql", "layout://x:team/sql:v1")
    run("verify", "layout://x:team/sql:v1", "--attestations", *PUBLIC, "--recompute")
    run("attach", "layout://x:team/sql:v1", "--list", "-o", "attached")
    assert (place / "attached" / "attestation.sigstore.json").exists()  # and no model.sig
    run("attest", "layout://x:team/sql:v1", "--fits", "base", *KEY)
    run("copy", "layout://x:team/sql:v1", "prod/sql")
    result = run("verify", "prod/sql", "--attestations", *PUBLIC, "--json")
    assert {attestation_document["kind"] for attestation_document in json.loads(result.stdout)["attestations"]} == {
        "fits",
        "training",
    }
    assert "is not signed" in run("verify", "prod/sql", "--key", "ci.pub", code=1).stdout  # it attests, and signs no files


def test_a_folder_has_no_attestations(place: Path, run: Run, workspace: Workspace) -> None:
    with pytest.raises(UsageError, match="is a folder, and only versions have attestations"):
        ah.attest("./sql", "ci.key", training=True, workspace=workspace)
    with pytest.raises(ParameterError, match="fits: nothing to attest. Choose what to attest") as caught:
        ah.attest("team/sql", "ci.key", workspace=workspace)
    assert caught.value.code == "nothing-to-attest"
    assert "Pass --key" in run("verify", "team/sql", "--attestations", code=2).stderr
    for words, error in (
        (("--recompute", *PUBLIC), "--recompute: requires --attestations. Pass --attestations too"),
        (
            ("--attestations", "--base", "base", *PUBLIC),
            "--base, --data and --parent-key: require --recompute. Pass --recompute too",
        ),
        (("--attestations", "--signed-as", "x", *PUBLIC), "--signed-as: is not for --attestations. Leave it out"),
        (("--signed-as", "x"), "--signed-as: requires --key or --identity. Pass the signer's too"),
    ):
        assert run("verify", "team/sql", *words, code=2).stderr == f"error: {error}  [conflicting-options]\n"


# ---- required


def require(place: Path, rules: str) -> None:
    (place / "adapterhub.toml").write_text(f"[policy]\n{rules}\n")


def test_a_policy_requires_attestations_on_every_way(place: Path, run: Run) -> None:
    run("copy", "team/sql", "layout://x:team/sql:v1")
    require(place, 'attestations."*".fits = ["ci.pub"]')
    ways = (
        ("pull", "team/sql", "-o", "out"),
        ("pull", "layout://x:team/sql:v1", "-o", "out"),
        ("resolve", "team/sql", "--for", "peft"),
        ("bundle", "team/sql", "-o", "out"),
        ("copy", "team/sql", "prod/sql"),
        ("copy", "layout://x:team/sql:v1", "prod/sql"),
        ("push", "team/sql", "layout://y:team/sql:v1"),
        ("push", "./sql", "team/new"),
    )
    for words in ways:
        result = run(*words, code=6)
        assert "adapterhub.toml: attestations.*.fits: has no attestation 'fits'" in result.stderr, (words, result.stderr)
        assert "Have it attested by a signer who is accepted" in result.stderr
        assert not (place / "out").exists()
    run("attest", "team/sql", "--fits", "base", *KEY)
    run("attest", "layout://x:team/sql:v1", "--fits", "base", *KEY)
    for words in (*ways[:1], *ways[2:3], *ways[5:7]):
        run(*words)
    run("pull", "prod/sql", "-o", "prod")  # the attestation came along


def test_an_attestation_is_no_signature_where_the_user_wants_one(place: Path, run: Run) -> None:
    run("attest", "team/sql", "--training", *KEY)
    require(place, 'attestations."*".training = ["ci.pub"]')
    assert "no keys are known" in run("pull", "team/sql", "-o", "out", "--require-signature", code=2).stderr
    run("pull", "team/sql", "-o", "out")


def test_the_attested_base_must_be_one_that_is_allowed(place: Path, run: Run) -> None:
    run("attest", "team/sql", "--fits", "base", *KEY)
    weights = sha256_file(place / "base" / "model.safetensors")
    require(place, f'bases = ["{weights}"]\nattestations."*".fits = ["ci.pub"]')
    assert "the attestation is about the base sha256:" in run("pull", "team/sql", "-o", "out", code=6).stderr
    rules = f'bases = ["{bases.read_hf(place / "base").fingerprint}"]\nattestations."*".fits = ["ci.pub"]'
    require(place, rules)
    run("pull", "team/sql", "-o", "out")


def test_an_adapter_may_fit_several_bases(place: Path, run: Run, workspace: Workspace) -> None:
    ah.push(write_adapter(place / "unpinned", 3), "team/unpinned", workspace=workspace)
    write_base_of(place / "more", 10000.0)
    with SafetensorsFile(place / "more" / "model.safetensors") as file:
        tensors = {name: file.tensor(name) for name in file.tensors}
    safetensors_file.write(place / "more" / "model.safetensors", {**tensors, "x.weight": np.zeros((2, 2), np.float32)}, {})
    for base in ("more", "base"):
        ah.attest("team/unpinned", "ci.key", fits=base, workspace=workspace)
    for base in ("more", "base"):
        words = ("verify", "team/unpinned", "--attestations", *PUBLIC, "--recompute", "--base", base)
        assert "fits: is about another base" in run(*words).stdout

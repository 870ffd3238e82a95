"""The policy of a project, asked with names and manifests."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from adapterhub.manifest.document import AdapterManifest
from adapterhub.project import settings_file
from adapterhub.project.policy import ATTESTATIONS, Policy, SigningRule, join
from adapterhub.project.policy_rules import Bounds, Measurements, VersionFacts
from adapterhub.trust.attestation import TYPES
from adapterhub_converters.errors import RefusedError, UsageError

MANIFEST = AdapterManifest.salvage({"r": 8, "modules": {"x": {"r": 32, "alpha": 1}}})
ONE, OTHER = (f"sha256:{digit * 64}" for digit in "12")
KNOWN = AdapterManifest.salvage(
    {
        "format": "peft",
        "license": "MIT",
        "base": {"repo": "org/base", "fingerprint": ONE},
        "files": [{"path": "adapter_model.safetensors", "digest": OTHER, "size": 1500}],
        "training": {
            "recorder": "owner",
            "metrics": {"eval_loss": 0.5, "eval_perplexity": "low"},
            "weights": [{"path": "model.safetensors", "digest": OTHER, "size": 1}],
        },
    }
)


def test_every_requirement_that_is_not_met_is_named() -> None:
    with pytest.raises(RefusedError) as caught:
        Policy("p", 16, True, ("MIT",)).check_manifest(MANIFEST, "team/sql")
    assert caught.value.items == (
        "max_rank: rank 32 is over 16", "require_base: its base is not pinned; push it with its base",
        "licenses: its license is not declared, not MIT",
    )  # fmt: skip
    Policy("p", 32, False, ("mit",)).check_manifest(dataclasses.replace(MANIFEST, license="MIT"), "team/sql")
    Policy("p", 1).check_manifest(AdapterManifest.salvage({}), "without a rank")
    Policy("p", allow=("team/*",)).check_name("team/sql")
    for name in ("teams/sql", "oci://host/team/sql", "Team/sql"):
        with pytest.raises(RefusedError, match="not a name that p allows"):
            Policy("p", allow=("team/*",)).check_name(name)


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (Policy("p", bases=("sha256:" + "3" * 64,)), f"bases: org/base ({ONE[:19]}…) is not one of the 1 digests"),
        (Policy("p", recorders=("trainer",)), "recorders: its training was recorded by owner, not trainer"),
        (Policy("p", formats=("gguf", "mlx")), "formats: its format is peft, not gguf or mlx"),
        (Policy("p", max_size=1499), "max_size: 1,500 bytes are over 1,499"),
        (Policy("p", metrics=(Bounds("eval_loss", max=0.4),)), "metrics.eval_loss: 0.5 is over 0.4"),
        (Policy("p", metrics=(Bounds("eval_loss", min=0.6),)), "metrics.eval_loss: 0.5 is below 0.6"),
        (Policy("p", metrics=(Bounds("reported_bleu", min=31),)), "metrics.reported_bleu: was not measured"),
        (Policy("p", metrics=(Bounds("eval_perplexity", max=9),)), "metrics.eval_perplexity: was not measured"),
        (
            Policy("p", metrics=(Bounds("eval_loss", max=1, recorders=("trainer",)),)),
            "metrics.eval_loss: was recorded by owner, not trainer",
        ),
    ],
)
def test_each_rule_refuses_by_its_name(policy: Policy, reason: str) -> None:
    assert policy.needs_manifest
    with pytest.raises(RefusedError, match="against the policy of p: ") as caught:
        policy.check_manifest(KNOWN, "team/sql")
    assert reason in caught.value.what
    assert caught.value.code == "against-policy"


def test_what_meets_the_rules_passes() -> None:
    for base in (ONE, OTHER):  # by its names and shapes, or by its weight files
        Policy("p", bases=(base,), formats=("peft",), max_size=1500).check_manifest(KNOWN, "team/sql")
    measured = Policy("p", metrics=(Bounds("eval_loss", 0.5, 0.5), Bounds("reported_bleu", min=31)))
    measured.check_manifest(KNOWN, "team/sql", VersionFacts(measurements=Measurements({"reported_bleu": 31.0})))
    recorded = Policy(
        "p", metrics=(Bounds("eval_loss", 0.5, 0.5, ("owner",)), Bounds("sql_bleu", min=31, recorders=("lm-eval",)))
    )
    recorded.check_manifest(KNOWN, "team/sql", VersionFacts(measurements=Measurements({"sql_bleu": 31.0}, lambda _: "lm-eval")))
    with pytest.raises(RefusedError, match=r"metrics.sql_bleu: was recorded by owner, not lm-eval"):
        recorded.check_manifest(KNOWN, "team/sql", VersionFacts(measurements=Measurements({"sql_bleu": 31.0})))
    with pytest.raises(RefusedError, match="1,501 bytes"):
        Policy("p", max_size=1500).check_manifest(KNOWN, "team/sql", VersionFacts(1501))


def test_several_policies_are_met_where_each_is() -> None:
    joined = join(Policy("one", max_rank=64), None, Policy("two", licenses=("MIT",), allow=("team/*",)))
    assert joined is not None
    assert joined.needs_license
    with pytest.raises(RefusedError, match="the policy of two: licenses"):
        joined.check_manifest(MANIFEST, "team/sql")
    with pytest.raises(RefusedError, match="not a name that two allows"):
        joined.check_name("other/sql")
    assert join(None, None) is None
    assert join(Policy("one"), Policy("one")) == Policy("one")


WHOLE = f"""\
[policy]
bases = ["{ONE}"]
formats = ["peft", "other"]
recorders = ["trainer", "axolotl"]
max_size = 200_000_000

[policy.metrics]
eval_perplexity = {{ max = 12 }}
"reported_exact.match" = {{ min = 0.7, max = 1, recorders = ["owner"] }}

[policy.signers]
"team/sql.v2" = ["k.pub"]

[policy.attestations."team/sql.*"]
fits = ["ci.pub"]
training = ["ci.pub", "lab"]
"""


def test_every_rule_is_read_from_the_file(tmp_path: Path) -> None:
    file = tmp_path / "adapterhub.toml"
    policy = settings_file.parse(WHOLE, file).policy
    assert (policy.bases, policy.formats, policy.max_size) == ((ONE,), ("peft", "other"), 200_000_000)
    assert policy.recorders == ("trainer", "axolotl")
    assert policy.metrics == (Bounds("eval_perplexity", None, 12.0), Bounds("reported_exact.match", 0.7, 1.0, ("owner",)))
    pattern, ci = "team/sql.*", tmp_path / "ci.pub"
    assert policy.signing_rules("team/sql.v2") == [
        SigningRule("team/sql.v2", (tmp_path / "k.pub",), "", str(file)),
        SigningRule(pattern, (ci,), "fits", str(file)),
        SigningRule(pattern, (ci, tmp_path / "lab"), "training", str(file)),
    ]
    assert policy.signing_rules("team/other") == []
    assert tuple(TYPES) == ATTESTATIONS


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ("max_sise = 3", "'policy.max_sise' is unknown"),
        ('bases = ["sha256:12"]', "'policy.bases' is not a list of digests"),
        ('formats = ["pefd"]', "'policy.formats' has an unknown format"),
        ("max_size = 1.5", "'policy.max_size' is not a whole number above 0"),
        ("metrics = 3", "'policy.metrics' is not a table"),
        ("metrics.loss = 3", "'policy.metrics.loss' is not a table"),
        ("metrics.loss = {}", "'policy.metrics.loss' is not a table of numbers"),
        ("metrics.loss = { max = true }", "'policy.metrics.loss' is not a table of numbers"),
        ("metrics.loss = { most = 3 }", "'policy.metrics.loss.most' is unknown"),
        ('metrics.loss = { recorders = ["trainer"] }', "'policy.metrics.loss' is not a table of numbers"),
        ('metrics.loss = { max = 1, recorders = "trainer" }', "'policy.metrics.loss.recorders' is not a list"),
        ("metrics.loss = { max = nan }", "not valid TOML"),
        ('attestations."*" = {}', "'policy.attestations.*' names no kind of attestation"),
        ('attestations."*".safe = ["k"]', "'policy.attestations.*.safe' is unknown"),
        ('attestations."*".fits = []', "'policy.attestations.*.fits' is not a list of at most 256 paths"),
        ('attestations."*" = ["k"]', "'policy.attestations.*' is not a table"),
        ('licenses = ["MIT"]\nlicense_parts = ["bases"]', "'policy.license_parts' has an unknown part"),
        ('license_parts = ["data"]', "'policy.license_parts' needs licenses"),
        ('scan = "some"', "'policy.scan' is not 'clean'"),
        ('max_age = "1 year"', "'policy.max_age' is not a duration"),
        (f'base_models."org/m".weights = ["{ONE}"]', "'policy.base_models.org/m.weights' needs an attestation"),
        ('base_models."org/m".revision = "1"', "'policy.base_models.org/m.revision' is unknown"),
        ('builders = ["urn:x"]', "'policy.builders' needs an attestation of the training of every name"),
        (f'evaluations.bleu = {{ data = ["{ONE}"] }}', "'policy.evaluations.bleu' is not a table of numbers"),
        ('evaluations.bleu = { min = 1, data = ["x"] }', "'policy.evaluations.bleu.data' is not a list of digests"),
        (
            'evaluations.bleu = { min = 1, recorders = ["a"], signers = ["k"] }',
            "'policy.evaluations.bleu.recorders' is for results without signers",
        ),
        ('signers."*" = { of = ["a", "b"], at_least = 3 }', "'policy.signers.*.at_least' is not a number of the 2 signers"),
        ('signers."*" = { of = ["a", "a"], at_least = 2 }', "'policy.signers.*.at_least' is not a number of the 1 signers"),
        ('signers."*" = { of = ["a"] }', "'policy.signers.*.at_least' is not a number"),
    ],
)
def test_a_rule_that_means_nothing_is_refused_by_its_name(tmp_path: Path, rules: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        settings_file.parse(f"[policy]\n{rules}\n", tmp_path / "x.toml")
    assert words in str(caught.value)

"""Forged claims: what somebody types, edits or signs without having done it is refused, and the words say why.

A training that was not the recorded one is found by `rebuild` (tests/training/test_replay.py); a record that is edited in the
hub or on its way has another digest.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import adapterhub as ah
from adapterhub.digest import sha256_file
from adapterhub.manifest import derive
from adapterhub.manifest.measurement import Evaluation
from adapterhub.manifest.release_statement import ReleaseStatement
from adapterhub.operations import signature_checks
from adapterhub.operations.attest_results import attest_results
from adapterhub.operations.workspace import Workspace
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.registry.releases import release_moves
from adapterhub.trust import keys, release_claims
from adapterhub_converters import bases
from tests.conftest import Run
from tests.support.adapters import write_adapter
from tests.trust.test_attestation import write_base_of

DIGEST = "sha256:" + "1" * 64
SIGNED_TRAINING = '[policy.attestations."*"]\ntraining = ["ci.pub"]\n'


class Place:
    """A folder with a base, its data, the key of a CI, and a registry, in which a forger writes an adapter."""

    def __init__(self, root: Path) -> None:
        self.root, self.workspace = root, Workspace(registry=root, policy=None)
        for name in ("ci", "mallory"):
            keys.generate(root / name)
        write_base_of(root / "base", 10000.0)
        (root / "train.jsonl").write_text('{"text": "a"}\n')
        with ah.Registry(root):
            pass
        self.folder = write_adapter(root / "sql", 5)

    def push(self, toml: str = "", ref: str = "team/sql") -> str:
        """Push the adapter with what its owner declares, and return its digest."""
        (self.folder / "adapter.toml").write_text(toml)
        return ah.push(self.folder, ref, workspace=self.workspace).digest

    def edit(self, **changes: object) -> None:
        """Change fields of adapter.json with a text editor."""
        document = json.loads((self.folder / "adapter.json").read_text())
        (self.folder / "adapter.json").write_text(json.dumps({**document, **changes}))

    def policy(self, text: str) -> None:
        (self.root / "adapterhub.toml").write_text(text)

    def push_edited_training(self, **changes: object) -> None:
        """Push the adapter with a training that did not take place, changed with a text editor."""
        (self.folder / "adapter.toml").write_text(self.true_record)
        manifest = derive.describe(self.folder, base=bases.read_hf(self.root / "base"))
        (self.folder / "adapter.toml").unlink()
        manifest.write(self.folder)
        self.edit(training={**manifest.to_dict()["training"], **changes}, files=[])
        self.push()

    def push_copied_bundles(self, toml: str = "") -> None:
        """Push another adapter as team/sql, and attach to it all that was signed about team/good."""
        write_adapter(self.folder, 6)
        (self.folder / "adapter.json").unlink(missing_ok=True)
        self.push(toml)
        with (
            signature_checks.open_signable("team/good", self.workspace) as source,
            signature_checks.open_signable("team/sql", self.workspace) as target,
        ):
            for raw in source.read():
                target.add(raw)

    @property
    def true_record(self) -> str:
        """A training that did not take place, with the digests of what lies here."""
        weights = self.root / "base" / "model.safetensors"
        return (
            "[training]\nconfig = {train = {steps = 3}}\nmetrics = {eval_perplexity = 1.0}\n"
            f'data = [{{path = "train.jsonl", digest = "{sha256_file(self.root / "train.jsonl")}"}}]\n'
            f'weights = [{{path = "model.safetensors", digest = "{sha256_file(weights)}", size = {weights.stat().st_size}}}]\n'
        )


def typed_training(place: Place) -> None:
    place.push(place.true_record)


def typed_training_metric(place: Place) -> None:
    place.push(place.true_record)
    place.policy('[policy]\nrecorders = ["trainer"]\n[policy.metrics]\neval_perplexity = { max = 12 }\n')


def typed_metric(place: Place) -> None:
    place.push(place.true_record)
    place.policy('[policy.metrics]\neval_perplexity = { max = 12, recorders = ["trainer"] }\n')


def typed_recorder(place: Place) -> None:
    (place.folder / "adapter.toml").write_text('[training]\nrecorder = "trainer"\nseed = 7\n')


def edited_recorder(place: Place) -> None:
    """The record says `trainer`, and even a CI that believes it signs for the record alone."""
    place.push_edited_training(recorder="trainer")
    ah.attest("team/sql", "ci.key", training=True, workspace=place.workspace)
    place.policy('[policy]\nrecorders = ["trainer"]\nbuilders = ["urn:adapterhub:trainer"]\n' + SIGNED_TRAINING)


def signed_by_a_stranger(place: Place) -> None:
    place.push(place.true_record)
    ah.attest("team/sql", "mallory.key", training=True, builder="https://ci.example", workspace=place.workspace)
    place.policy(SIGNED_TRAINING)


def typed_weights(place: Place) -> None:
    place.push(f'[base]\nrepo = "org/m"\n{place.true_record}')
    digest = sha256_file(place.root / "base" / "model.safetensors")
    place.policy(f'[policy.base_models."org/m"]\nweights = ["{digest}"]\n{SIGNED_TRAINING}')


def typed_evaluation(place: Place) -> None:
    place.push(f'[[evaluations]]\nmetric = "bleu"\nvalue = 99.0\ndigest = "{DIGEST}"\nharness = "lm-eval 0.4.9"\n')
    place.policy(f'[policy.evaluations.bleu]\nmin = 20\ndata = ["{DIGEST}"]\nrecorders = ["lm-eval"]\n')


def typed_evaluation_recorder(place: Place) -> None:
    (place.folder / "adapter.toml").write_text('[[evaluations]]\nmetric = "bleu"\nvalue = 99\nrecorder = "lm-eval"\n')


def edited_evaluation_recorder(place: Place) -> None:
    """A result in adapter.json that names a tool, an account or anybody else who did not measure it."""
    derive.describe(place.folder).write(place.folder)
    names = ("lm-eval", "adapterhub", "account:ci")
    place.edit(evaluations=[{"metric": "bleu", "value": 99.0, "digest": DIGEST, "recorder": name} for name in names])
    place.push()
    place.policy(f'[policy.evaluations.bleu]\nmin = 20\ndata = ["{DIGEST}"]\nrecorders = {list(names)}\n')


def metric_in_the_name_of(recorder: str, rules: str = "") -> Callable[[Place], None]:
    """A metric of a training in adapter.json, under the name that a search gives one of an evaluation."""

    def edited_metric(place: Place) -> None:
        place.push_edited_training(metrics={"sql_bleu": 99.0}, recorder=recorder)
        place.policy(f'[policy.metrics]\nsql_bleu = {{ min = 20, recorders = ["{recorder}"] }}\n{rules}')
        if rules:
            ah.attest("team/sql", "ci.key", training=True, builder="https://ci.example", workspace=place.workspace)

    return edited_metric


def evaluation_of_another_version(place: Place) -> None:
    """A true result, attached to what it is not about."""
    good = place.push(ref="team/good")
    evaluation = Evaluation("test", {"bleu": 30}, data=({"path": "rows", "digest": DIGEST},))
    key = keys.read_private(place.root / "ci.key")
    attest_results("team/good", [evaluation], key, digest=good, ok=True, workspace=place.workspace)
    place.push_copied_bundles()
    place.policy('[policy.evaluations.bleu]\nmin = 20\nsigners = ["ci.pub"]\n')


def training_of_another_version(place: Place) -> None:
    """The provenance of a training, attached to weights that it did not make, with the same record."""
    place.push(place.true_record, "team/good")
    ah.attest("team/good", "ci.key", training=True, builder="https://ci.example", workspace=place.workspace)
    place.push_copied_bundles(place.true_record)
    place.policy(SIGNED_TRAINING)


def fits_of_another_version(place: Place) -> None:
    place.push(ref="team/good")
    ah.attest("team/good", "ci.key", fits="base", workspace=place.workspace)
    place.push_copied_bundles()
    place.policy('[policy.attestations."*"]\nfits = ["ci.pub"]\n')


def typed_fingerprint(place: Place) -> None:
    """An adapter of some base that says to be of another one."""
    derive.describe(place.folder).write(place.folder)
    base = json.loads((place.folder / "adapter.json").read_text())["base"]
    place.edit(base=base | {"fingerprint": DIGEST})
    place.push()
    place.policy(f'[policy]\nbases = ["{DIGEST}"]\n[policy.attestations."*"]\nfits = ["ci.pub"]\n')


def declared_fingerprint(place: Place) -> None:
    (place.folder / "adapter.toml").write_text(f'[base]\nfingerprint = "{DIGEST}"\n')


def another_base(place: Place) -> None:
    """The fits claim is about a base of the same shapes and names that computes something else."""
    derive.describe(place.folder).write(place.folder)
    place.push()
    write_base_of(place.root / "other-base", 5.0)
    ah.attest("team/sql", "ci.key", fits="other-base", workspace=place.workspace)


def edited_rank(place: Place) -> None:
    derive.describe(place.folder).write(place.folder)
    place.edit(r=1)


def edited_merge(place: Place) -> None:
    """A merge with other weights than its recipe makes of its parents."""
    place.push(ref="team/a")
    write_adapter(place.folder, 6)
    (place.folder / "adapter.json").unlink(missing_ok=True)
    place.push(ref="team/b")
    ah.merge(["team/a", "team/b"], str(place.root / "both"), method="linear", workspace=place.workspace)
    recorded = json.loads((place.root / "both" / "adapter.json").read_text())
    write_adapter(place.folder, 7)
    derive.describe(place.folder).write(place.folder)
    place.edit(parents=recorded["parents"], recipe=recorded["recipe"])
    place.push()


def expired_parent(place: Place) -> None:
    """A copy of an expired adapter that declares another day."""
    parent = place.push('expires = "2020-01-01"\n', "team/old")
    (place.folder / "adapter.json").unlink(missing_ok=True)
    derive.describe(place.folder, declared={"expires": "2099-01-01"}).write(place.folder)
    place.edit(parents=[{"digest": parent, "method": "convert"}])
    (place.folder / "adapter.toml").unlink()
    ah.push(place.folder, "team/sql", workspace=place.workspace)
    place.policy("[policy]\nunexpired = true\n")


def other_name(place: Place) -> None:
    """A signature for one name, under another."""
    place.push(ref="team/trial")
    ah.sign("team/trial", "ci.key", workspace=place.workspace)
    place.push()  # the same bytes
    place.policy('[policy.signers]\n"*" = ["ci.pub"]\n')


def unapproved_move(place: Place) -> None:
    """A tag that needs an approval, which none but a stranger has signed."""
    place.push()
    ah.sign("team/sql", "mallory.key", workspace=place.workspace)
    place.policy('[promote.prod.require]\napprovals = 1\napprovers = ["ci.pub"]\n')


def approved_by_a_stranger(place: Place) -> None:
    unapproved_move(place)
    signer = keys.read_private(place.root / "mallory.key")
    with Registry.open(place.root) as registry:
        version = registry.resolve(Ref("team/sql", number=1))
        claim = release_claims.sign(release_claims.APPROVAL, "team/sql", version.digest, signer, text="I read it", tag="prod")
        release_moves.approve(registry.ledger, version.ref, "prod", ReleaseStatement("I read it", claim.decode()))


PULL = "pull team/sql -o out"
VERIFY = "verify team/sql --attestations --key ci.pub --recompute"
OTHER_DIGEST = "the attestation is about sha256:"
FORGERIES: list[tuple[Callable[[Place], None], str, int, str]] = [
    (typed_training, "attest team/sql --training --key ci.key", 6, "was recorded by owner, and not by adapterhub's trainer"),
    (typed_training, "attest team/sql --training --builder urn:adapterhub:trainer --key ci.key", 6, "what the trainer signs"),
    (typed_training_metric, PULL, 6, "recorders: its training was recorded by owner, not trainer"),
    (typed_metric, PULL, 6, "metrics.eval_perplexity: was recorded by owner, not trainer"),
    (typed_recorder, "push sql team/sql", 2, "unknown key training.recorder"),
    (edited_recorder, PULL, 6, "names the builder urn:adapterhub:record, which is not allowed"),
    (signed_by_a_stranger, PULL, 6, "which is not accepted"),
    (typed_weights, PULL, 6, "attestations.*.training: has no attestation 'training'"),
    (typed_evaluation, PULL, 6, "evaluations.bleu: was recorded by owner, not lm-eval"),
    (typed_evaluation_recorder, "push sql team/sql", 2, "'lm-eval' is no recorder of a declaration, which its owner makes"),
    (edited_evaluation_recorder, PULL, 6, "evaluations.bleu: was recorded by owner, not lm-eval or adapterhub or account:ci"),
    (metric_in_the_name_of("account:ci"), PULL, 6, "metrics.sql_bleu: was recorded by owner, not account:ci"),
    (metric_in_the_name_of("adapterhub"), PULL, 6, "metrics.sql_bleu: was recorded by owner, not adapterhub"),
    (metric_in_the_name_of("trainer"), PULL, 6, "metrics.sql_bleu: was recorded by owner, not trainer"),
    (metric_in_the_name_of("account:ci", SIGNED_TRAINING), PULL, 6, "sql_bleu: was recorded by owner, not account:ci"),
    (evaluation_of_another_version, PULL, 6, "no attestation 'tests'"),
    (training_of_another_version, PULL, 6, OTHER_DIGEST),
    (training_of_another_version, VERIFY, 1, f"no attestation that is accepted: {OTHER_DIGEST}"),
    (fits_of_another_version, PULL, 6, OTHER_DIGEST),
    (fits_of_another_version, f"{VERIFY} --base base", 1, f"no attestation that is accepted: {OTHER_DIGEST}"),
    (typed_fingerprint, PULL, 6, "attestations.*.fits: has no attestation 'fits'"),
    (typed_fingerprint, "attest team/sql --fits base --key ci.key", 6, "trained on sha256:111111111111, this base is sha256:"),
    (declared_fingerprint, "push sql team/sql", 2, "unknown key base.fingerprint"),
    (approved_by_a_stranger, "tag team/sql:v1 prod", 6, "approvals: 0 of 1; not counted: is signed by the key"),
    (another_base, f"{VERIFY} --base base", 1, "fits: is another statement when it is computed again: base.config.rope_theta"),
    (unapproved_move, "tag team/sql:v1 prod", 6, "does not meet its requirements: approvals: 0 of 1"),
    (edited_rank, "push sql team/sql", 4, '"r" is 1, but the weights have 2'),
    (edited_merge, "attest team/sql --merge --parent-key ci.pub --key ci.key", 6, "is not what its recipe makes of its"),
    (expired_parent, PULL, 6, "unexpired: it expired on 2020-01-01"),
    (other_name, PULL, 6, "the signature is for 'team/trial', not for 'team/sql'"),
]  # fmt: skip


@pytest.mark.parametrize(("forge", "words", "code", "reason"), FORGERIES, ids=[row[0].__name__ for row in FORGERIES])
def test_a_forged_claim_is_refused_with_the_reason(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Run,
    forge: Callable[[Place], None],
    words: str,
    code: int,
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    forge(Place(tmp_path))
    result = run(*words.split(), code=code)
    assert reason in result.stderr + result.stdout
    assert not (tmp_path / "out").exists()

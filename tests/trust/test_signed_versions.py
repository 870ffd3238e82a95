"""Signatures travel with what they are about, and the policy of a project requires them on every way in and out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapterhub.operations import pull as pull_operation
from adapterhub.operations.signature_checks import Demand
from adapterhub.operations.workspace import Workspace
from adapterhub.registry.registry import Registry
from adapterhub.serve.resolving import resolve
from adapterhub.trust import bundle, keys
from adapterhub_converters.errors import RefusedError, UsageError
from tests.conftest import Run
from tests.support.adapters import Make


@pytest.fixture
def team(tmp_path: Path) -> tuple[Path, Path]:
    secret, public = keys.generate(tmp_path / "keys" / "team")
    return secret, Path(public.source)


@pytest.fixture
def required(run: Run, team: tuple[Path, Path], tmp_path: Path) -> None:
    """A project in which what is in `team/` must be signed."""
    run("init")
    (tmp_path / "adapterhub.toml").write_text('[policy.signers]\n"team/*" = ["keys/team.pub"]\n')


def described(run: Run, folder: Path) -> Path:
    """With its adapter.json, so that its files are those of the version that it becomes."""
    run("describe", folder)
    return folder


def test_signatures_go_along_with_a_copy_and_what_stays_behind_is_said(
    run: Run, make: Make, team: tuple[Path, Path], tmp_path: Path
) -> None:
    run("push", described(run, make("sql")), "layout://x:team/sql:v1")
    run("sign", "layout://x:team/sql:v1", "--key", team[0])
    for source, target in (("layout://x:team/sql:v1", "team/sql"), ("layout://x:team/sql:v1", "layout://z:team/sql:v1")):
        run("copy", source, target)
        run("verify", target, "--key", team[1])
    (tmp_path / "bucket").mkdir()
    result = run("copy", "team/sql", f"file://{tmp_path}/bucket/team/sql")
    assert "has no attachments, so the signatures stay behind" in result.stderr


@pytest.mark.parametrize("source", ["team/sql:v1", "layout://x:team/sql:v1"])
@pytest.mark.parametrize("command", ["pull {} -o {}", "copy {} ./{}"])
def test_a_pull_into_a_folder_takes_the_signature_along_and_says_what_stays_behind(
    run: Run, make: Make, team: tuple[Path, Path], tmp_path: Path, command: str, source: str
) -> None:
    run("push", described(run, make("sql")), "team/sql")
    run("sign", "team/sql", "--key", team[0])
    run("copy", "team/sql", "layout://x:team/sql:v1")
    assert "behind" not in run(*command.format(source, "out").split()).stderr
    run("verify", "out", "--key", team[1])
    signature = (tmp_path / "out" / "model.sig").read_bytes()
    other, _ = keys.generate(tmp_path / "keys" / "other")
    run("sign", source, "--key", other)
    note = "1 signature or attestation stays behind: a folder has one model.sig"
    assert note in run(*command.format(source, "again").split()).stderr
    run(*command.format(source, "out").split())
    assert (tmp_path / "out" / "model.sig").read_bytes() == signature  # the one that is there stays


def test_a_pull_of_what_nobody_signed_writes_no_signature(run: Run, make: Make, tmp_path: Path) -> None:
    run("push", make("sql"), "team/sql")
    assert run("pull", "team/sql", "-o", "out").stderr == ""
    assert not (tmp_path / "out" / "model.sig").exists()


def test_a_policy_requires_signatures_of_what_is_pulled_copied_and_resolved(
    run: Run, make: Make, team: tuple[Path, Path], required: None, tmp_path: Path
) -> None:
    (tmp_path / "adapterhub.toml").rename(tmp_path / "policy")
    run("push", make("sql"), "team/sql")
    run("copy", "team/sql", "layout://x:team/sql:v1")
    run("copy", "team/sql", "other/sql")
    (tmp_path / "policy").rename(tmp_path / "adapterhub.toml")
    for words in (
        ("pull", "team/sql", "-o", "out"),
        ("pull", "team/sql", "-o", "out", "--to", "gguf"),
        ("resolve", "team/sql", "--for", "peft"),
        ("copy", "team/sql", "team/more"),
        ("copy", "other/sql", "team/more"),
        ("copy", "layout://x:team/sql:v1", "team/more"),
        ("push", "other/sql", "team/more"),
        ("lock", "team/sql"),
    ):
        assert "is not signed" in run(*words, code=6).stderr, words
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "adapters.lock").exists()
    run("sign", "team/sql", "--key", team[0])
    run("lock", "team/sql")
    run("pull", "team/sql", "-o", "out")
    run("pull", "team/sql", "-o", "again", "--require-signature")
    assert (tmp_path / "again" / "model.sig").exists()
    run("pull", "other/sql", "-o", "unsigned")
    assert "is for 'team/sql', not for 'team/more'" in run("copy", "team/sql", "team/more", code=6).stderr


def test_a_policy_is_asked_in_python_too(run: Run, make: Make, team: tuple[Path, Path], required: None, tmp_path: Path) -> None:
    from adapterhub.project import settings_file

    workspace = Workspace(
        registry=tmp_path, policy=settings_file.read(tmp_path / "adapterhub.toml").policy, cache=tmp_path / "c"
    )
    (tmp_path / "adapterhub.toml").unlink()
    run("push", make("sql"), "team/sql")
    with pytest.raises(RefusedError, match="is not signed"):
        resolve("team/sql", runtime="peft", workspace=workspace)
    run("sign", "team/sql", "--key", team[0])
    assert resolve("team/sql", runtime="peft", workspace=workspace).digest


def test_a_user_cannot_accept_for_the_policy_what_was_signed_for_another_name(
    run: Run, make: Make, team: tuple[Path, Path], required: None, tmp_path: Path
) -> None:
    (tmp_path / "adapterhub.toml").rename(tmp_path / "policy")
    run("push", make("sql"), "team/sql")
    run("sign", "team/sql", "--key", team[0], "--name", "other/sql")
    (tmp_path / "policy").rename(tmp_path / "adapterhub.toml")
    words = ("pull", "team/sql", "-o", "out", "--require-signature", "--key", team[1], "--signed-as", "other/sql")
    assert "is for 'other/sql', not for 'team/sql'" in run(*words, code=6).stderr


def test_a_key_that_is_remembered_is_required_of_the_whole_namespace(
    run: Run, make: Make, team: tuple[Path, Path], tmp_path: Path
) -> None:
    """Once known, nobody who takes the namespace over can leave the signature out, or sign with a key of their own."""
    other_key = keys.generate(tmp_path / "other")[0]
    for seed, name in enumerate(("team/sql", "team/more", "free/sql")):
        run("push", make("a", seed), name)
    run("sign", "team/sql", "--key", team[0])
    pull = ("pull", "team/sql", "-o", "out", "--require-signature")
    result = run(*pull, "--key", team[1], "--remember")
    assert "what comes from there must be signed by the p256 key" in result.stderr
    assert "must be signed" not in run(*pull, "--key", team[1], "--remember").stderr
    run(*pull)  # by the key that is known
    run("pull", "free/sql", "-o", "free")
    for words in (
        ("pull", "team/more", "-o", "more"),
        ("copy", "team/more", "free/more"),
        ("resolve", "team/more", "--for", "peft"),
        ("lock", "team/more"),
    ):
        refused = run(*words, code=6).stderr
        assert "is not signed; team is known to be signed by the p256 key" in refused
        assert refused.endswith("[known-signer]\n")
    run("sign", "team/more", "--key", other_key)
    result = run("pull", "team/more", "-o", "more", "--require-signature", "--key", other_key.with_suffix(".pub"), code=6)
    assert "remove the line from" in result.stderr
    assert not (tmp_path / "more").exists()
    run("sign", "team/more", "--key", team[0])
    run("pull", "team/more", "-o", "more")


def test_what_a_policy_requires_to_be_signed_is_not_locked_without(
    run: Run, make: Make, team: tuple[Path, Path], tmp_path: Path
) -> None:
    """The lock file got the digest of whoever had taken the name over."""
    run("push", make("sql"), "team/sql")
    run("copy", "team/sql", "layout://x:team/sql:v1")
    (tmp_path / "adapterhub.toml").write_text('[policy.signers]\n"*" = ["keys/team.pub"]\n')
    for ref in ("team/sql", "layout://x:team/sql:v1"):
        assert "is not signed" in run("lock", ref, code=6).stderr
    assert not (tmp_path / "adapters.lock").exists()


def test_a_namespace_at_an_address_is_another_one(run: Run, make: Make, team: tuple[Path, Path]) -> None:
    run("push", make("sql"), "team/sql")
    run("copy", "team/sql", "layout://x:team/sql:v1")
    run("sign", "layout://x:team/sql:v1", "--key", team[0])
    run("pull", "layout://x:team/sql:v1", "-o", "out", "--key", team[1], "--remember")
    run("pull", "team/sql", "-o", "unsigned")
    run("push", make("more", 2), "layout://x:team/more:v1")
    assert "layout://x is known to be signed" in run("pull", "layout://x:team/more:v1", "-o", "more", code=6).stderr


def test_what_was_prepared_before_a_key_was_known_is_not_served_after(run: Run, make: Make, team: tuple[Path, Path]) -> None:
    run("push", make("sql"), "layout://x:team/sql:v1")
    run("push", make("more", 2), "layout://x:team/more:v1")
    run("push", "layout://x:team/more:v1", "team/more")
    digest = json.loads(run("show", "team/more", "--json").stdout)["digest"]
    run("resolve", f"layout://x@{digest}", "--for", "peft")
    run("sign", "layout://x:team/sql:v1", "--key", team[0])
    run("pull", "layout://x:team/sql:v1", "-o", "out", "--key", team[1], "--remember")
    assert "is not signed" in run("resolve", f"layout://x@{digest}", "--for", "peft", code=6).stderr


def test_a_damaged_line_of_known_keys_lets_nothing_through(
    run: Run, make: Make, team: tuple[Path, Path], tmp_path: Path
) -> None:
    run("push", make("sql"), "team/sql")
    run("sign", "team/sql", "--key", team[0])
    run("pull", "team/sql", "-o", "out", "--key", team[1], "--remember")
    (signers_file,) = tmp_path.rglob("known_signers")
    signers_file.write_text(signers_file.read_text().replace(" p256 ", " p256  "))
    assert "is not a namespace, a kind and a key" in run("pull", "team/sql", "-o", "out2", code=2).stderr
    signers_file.write_text("team p256 AAAA\n")
    assert "not a public key in PEM" in run("pull", "team/sql", "-o", "out2", code=4).stderr


def test_a_key_that_is_missing_is_an_error_not_a_way_through(run: Run, make: Make, tmp_path: Path) -> None:
    run("push", make("sql"), "team/sql")
    (tmp_path / "adapterhub.toml").write_text('[policy.signers]\n"*" = ["nowhere.pub"]\n')
    assert "nowhere.pub: no such file" in run("pull", "team/sql", "-o", "out", code=3).stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rule", ['signers = ["a"]', '[policy.signers]\n"*" = []', '[policy.signers]\n"*" = "k"'])
def test_a_rule_that_says_nothing_is_an_error(run: Run, make: Make, tmp_path: Path, rule: str) -> None:
    (tmp_path / "adapterhub.toml").write_text(f"[policy]\n{rule}\n" if rule.startswith("signers") else f"{rule}\n")
    assert "adapterhub.toml" in run("push", make("sql"), "team/sql", code=2).stderr


def test_without_keys_a_required_signature_is_a_usage_error(run: Run, make: Make, tmp_path: Path) -> None:
    run("init")
    run("push", make("sql"), "team/sql")
    error = run("pull", "team/sql", "-o", "out", "--require-signature", code=2).stderr
    reason = "team/sql: no keys are known to verify a signature with"
    hint = "Pass --key or --identity, or set policy.signers in adapterhub.toml"
    assert error == f"error: {reason}. {hint}  [keys-required]\n"
    with pytest.raises(UsageError, match="Name the keys or identities to accept"):
        pull_operation.pull("team/sql", tmp_path / "out", workspace=Workspace(registry=tmp_path), demand=Demand(keys=()))
    assert not (tmp_path / "out").exists()


def test_a_folder_without_files_has_nothing_to_sign(run: Run, team: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty" / ".git").mkdir(parents=True)
    result = run("sign", "./empty", "--key", team[0], code=3)
    assert result.stderr == "error: empty: has no files to sign. Name a folder with an adapter  [not-found]\n"


def cosign_bundle(key: keys.PrivateKey, *subjects: dict[str, dict[str, str]]) -> bytes:
    """What `cosign sign` of cosign 3 attaches: a statement about the digest of a manifest, without a name."""
    document = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": list(subjects),
        "predicateType": "https://sigstore.dev/cosign/sign/v1",
        "predicate": {},
    }
    signed = json.loads(bundle.sign_payload(json.dumps(document).encode(), key, "x"))
    signed["verificationMaterial"] = {"publicKey": {"hint": key.public.hints[1]}}
    return json.dumps(signed).encode()


def test_a_signature_of_cosign_is_verified_by_keys_and_policies_for_these_bytes_alone(
    run: Run, make: Make, tmp_path: Path
) -> None:
    run("key", "generate", "team")
    run("key", "generate", "other")
    key = keys.read_private(tmp_path / "team.key")
    (make("other") / "README.md").write_text("# Another adapter\n")
    make("sql")
    first, second = (
        json.loads(run("push", name, f"team/{name}", "--json").stdout)["digest"].removeprefix("sha256:")
        for name in ("sql", "other")
    )
    good, another = {"digest": {"sha256": first}}, {"digest": {"sha256": second}}
    with Registry.open(tmp_path / "xdg" / "adapterhub") as registry:
        for subjects in ((another,), (good, another), (good,)):
            registry.store.signatures.add(f"sha256:{first}", cosign_bundle(key, *subjects), 64)
        registry.store.signatures.add(f"sha256:{second}", cosign_bundle(key, good), 64)
    assert "signed by cosign, for every name, by team.pub" in run("verify", "team/sql", "--key", "team.pub").stdout
    assert "which is not accepted" in run("verify", "team/sql", "--key", "other.pub", code=1).stdout
    assert "not about" in run("verify", "team/other", "--key", "team.pub", code=1).stdout
    (tmp_path / "adapterhub.toml").write_text('[policy.signers]\n"*" = ["team.pub"]\n')
    run("pull", "team/sql", "-o", "out")
    assert "the signature of cosign is not about" in run("pull", "team/other", "-o", "out2", code=6).stderr

"""Signatures of others: what was tampered with, stripped, replayed or confused is refused by name, and nothing is written."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import adapterhub as ah
from adapterhub.project.policy import Policy
from adapterhub.ref import Ref
from adapterhub.registry import signature_policy
from adapterhub.registry.registry import Registry
from adapterhub.remotes.oci import referrers
from adapterhub.remotes.remote_address import parse
from adapterhub.store.signature_files import MAX_SIGNATURES, read_bounded
from adapterhub.trust import bundle, keys, signers
from adapterhub.trust.statement import Statement
from adapterhub_converters.errors import AdapterhubError, IntegrityError, ParameterError, RefusedError, UsageError
from tests.conftest import ROOT, Run
from tests.support.adapters import Make


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    secret, public = keys.generate(tmp_path_factory.mktemp("keys") / "team")
    return secret, Path(public.source)


@pytest.fixture(scope="module")
def secret(pair: tuple[Path, Path]) -> keys.PrivateKey:
    return keys.read_private(pair[0])


@pytest.fixture
def signed(run: Run, make: Make, pair: tuple[Path, Path]) -> Path:
    folder = make("sql")
    run("sign", folder, "--key", pair[0])
    return folder


# ---- files


def tampered(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)


def truncated(folder: Path) -> None:
    os.truncate(folder / "README.md", 3)


def swapped(folder: Path) -> None:
    (folder / "README.md").rename(folder / "x")
    (folder / "adapter_config.json").rename(folder / "README.md")
    (folder / "x").rename(folder / "adapter_config.json")


def added(folder: Path) -> None:
    (folder / "extra.json").write_text("{}")


def added_below(folder: Path) -> None:
    (folder / "more" / ".git").mkdir(parents=True)
    (folder / "more" / ".git" / "hook.json").write_text("{}")


def hidden(folder: Path) -> None:
    (folder / ".hidden").write_text("x")


def removed(folder: Path) -> None:
    (folder / "README.md").unlink()


def renamed(folder: Path) -> None:
    (folder / "README.md").rename(folder / "readme.md")


FOLDERS: dict[Callable[[Path], None], str] = {
    tampered: "adapter_model.safetensors (changed)",
    truncated: "README.md (changed)",
    swapped: "README.md (changed), adapter_config.json (changed)",
    added: "extra.json (not signed)",
    added_below: "more/.git/hook.json (not signed)",
    hidden: ".hidden (not signed)",
    removed: "README.md (missing)",
    renamed: "README.md (missing), readme.md (not signed)",
}


@pytest.mark.parametrize("attack", FOLDERS, ids=lambda attack: attack.__name__)
def test_files_that_are_not_those_that_were_signed_are_named(
    run: Run, signed: Path, pair: tuple[Path, Path], attack: Callable[[Path], None]
) -> None:
    attack(signed)
    result = run("verify", "sql", "--key", pair[1], "--json", code=1)
    (finding,) = json.loads(result.stdout)["findings"]
    assert (finding["code"], finding["what"]) == ("signature", f"is not what was signed: {FOLDERS[attack]}")
    assert finding["hint"] == "Fetch the files that were signed, or have these signed"


def test_a_link_in_a_signed_folder_is_refused(run: Run, signed: Path, pair: tuple[Path, Path]) -> None:
    (signed / "link.json").symlink_to("/etc/hostname")
    assert "a link" in run("verify", "sql", "--key", pair[1], code=6).stderr
    (signed / "link.json").unlink()
    (signed / "model.sig").rename(signed.parent / "model.sig")
    (signed / "model.sig").symlink_to(signed.parent / "model.sig")
    assert "a link" in run("verify", "sql", "--key", pair[1], code=6).stderr


# ---- crowds


def test_a_small_signature_is_read_whatever_else_is_attached() -> None:
    def lying() -> bytes:
        raise IntegrityError("x", "other bytes")

    large = [(bundle.MAX_BUNDLE, lambda: b"large")] * 500
    signatures = read_bounded([*large, (10, lying), (1000, lambda: b"real"), *large])
    assert signatures[0] == b"real"
    assert len(signatures) == 16  # 64 MiB of them
    crowd = [(65_000, lambda: b"crowd")] * (MAX_SIGNATURES - 1)
    assert b"real" in read_bounded([*crowd, (64 << 10, lambda: b"real")])


def test_no_more_signatures_of_a_version_are_kept_than_are_read(tmp_path: Path) -> None:
    digest = "sha256:" + "a" * 64
    with Registry.init(tmp_path / "r") as registry:
        signatures = registry.store.signatures
        assert [signatures.add(digest, text, 2) for text in (b"1", b"2", b"1")] == [True, True, False]
        with pytest.raises(RefusedError) as error:
            signatures.add(digest, b"3", 2)
        assert str(error.value) == f"{digest}: has 2 signatures already, as many as are kept"
        assert sorted(signatures.read(digest, 10)) == [b"1", b"2"]


def test_what_came_along_leaves_room_for_the_signature_of_the_user_and_for_one_that_is_required(
    run: Run, make: Make, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signature_policy, "MAX_UNREQUESTED", 3)
    run("push", make("sql"), "team/sql")
    strangers = keys.read_private(keys.generate(tmp_path / "stranger", keys.ED25519)[0])
    policy = Policy("p", signers=(("team/*", (pair[1],)),))
    with Registry.open(tmp_path / "xdg" / "adapterhub") as registry:
        manifest, store = registry.oci_manifest(registry.resolve(Ref("team/sql"))), registry.store
        files = signature_policy.signed_files(manifest)
        crowd = [bundle.sign(Statement(f"team/sql{n}", files), strangers) for n in range(5)]
        signature_policy.store_signatures(store, manifest, crowd)
        assert len(signature_policy.all_signatures(store, manifest, ())) == 3
        required = bundle.sign(Statement("team/sql", files), keys.read_private(pair[0]))
        signature_policy.store_signatures(store, manifest, [required], policy, "team/sql")
        assert required in signature_policy.all_signatures(store, manifest, ())
    keys.generate(tmp_path / "mine")
    run("sign", "team/sql", "--key", "mine.key")
    run("verify", "team/sql", "--key", "mine.pub")


def test_an_attachment_that_lies_about_its_file_does_no_harm(
    run: Run, make: Make, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    place = f"layout://{tmp_path}/there:v1"
    run("push", make("sql"), place)
    run("sign", place, "--key", pair[0])
    with ah.Workspace(registry=tmp_path).connect(parse(place)) as remote:
        manifest, target = remote.manifest("v1"), remote.as_referring_target()
        assert target is not None
        (good,) = referrers.referrers(target, manifest.digest)
        document = json.loads(target.read_document(good.digest))
        for layer in ({"size": 1}, {"digest": "sha256:" + "a" * 64}):
            lying = {**document, "layers": [{**document["layers"][0], **layer}]}
            raw = json.dumps(lying).encode()
            referrers._put_referrer(target, raw, manifest.digest)
        assert len(referrers.referrers(target, manifest.digest)) == 3
    run("pull", place, "-o", "out", "--require-signature", "--key", pair[1])


# ---- bundles


# ---- keys


# ---- versions


def test_a_version_whose_signature_was_stripped_is_not_pulled(
    run: Run, make: Make, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    run("push", make("sql"), "team/sql")
    result = run("pull", "team/sql", "-o", "out", "--require-signature", "--key", pair[1], code=4)
    hint = "Ask its owner to sign it, or copy it from where it is signed with `adapterhub copy FROM team/sql`"
    assert result.stderr == f"error: team/sql: is not signed. {hint}  [signature-missing]\n"
    assert not (tmp_path / "out").exists()


def test_the_signature_of_another_version_is_refused(run: Run, make: Make, pair: tuple[Path, Path], tmp_path: Path) -> None:
    run("init")
    run("push", make("sql"), "team/sql")
    run("push", make("bad", 2), "team/sql")
    run("sign", "team/sql:v1", "--key", pair[0])
    store = tmp_path / ".adapterhub" / "signatures" / "sha256"
    (folder,) = store.iterdir()
    newest = json.loads(run("show", "team/sql:v2", "--json").stdout)["digest"]
    folder.rename(store / newest.removeprefix("sha256:"))
    result = run("pull", "team/sql:v2", "-o", "out", "--require-signature", "--key", pair[1], code=4)
    assert "is not what was signed: adapter.json (changed), adapter_model.safetensors (changed)" in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_signature_for_another_name_is_refused_unless_it_is_asked_for(
    run: Run, make: Make, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """Without it, who may push to one name could replay there what was signed for another."""
    run("push", make("sql"), "team/sql")
    run("sign", "team/sql", "--key", pair[0])
    run("copy", "team/sql", "prod/answers")
    words = ("pull", "prod/answers", "-o", "out", "--require-signature", "--key", pair[1])
    result = run(*words, code=4)
    assert "the signature is for 'team/sql', not for 'prod/answers'" in result.stderr
    assert "--signed-as team/sql" in result.stderr
    assert result.stderr.endswith("[signature-name]\n")
    assert not (tmp_path / "out").exists()
    run(*words, "--signed-as", "team/sql")
    run("copy", "team/sql", "team/mysql")  # whose name ends with the same letters
    run("pull", "team/mysql", "-o", "out2", "--require-signature", "--key", pair[1], code=4)


def test_one_good_signature_among_bad_ones_is_enough(run: Run, make: Make, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Anybody who can write to a registry can attach anything there."""
    run("push", make("sql"), "team/sql")
    run("copy", "team/sql", "layout://x:team/sql:v1")
    for number in range(3):
        (tmp_path / "model.sig").write_text(f"[{number}" if number else "")
        run("attach", "layout://x:team/sql:v1", "model.sig", "--type", bundle.MEDIA_TYPE)
    pull = ("pull", "layout://x:team/sql:v1", "-o", "out", "--require-signature", "--key", pair[1])
    assert "none of its 3 signatures is accepted" in run(*pull, code=4).stderr
    assert not (tmp_path / "out").exists()
    run("sign", "layout://x:team/sql:v1", "--key", pair[0])
    run(*pull)
    assert (tmp_path / "out" / "model.sig").exists()


# ---- secrets


def test_a_private_key_is_its_owners_alone_and_in_no_output(started: Run, make: Make, tmp_path: Path) -> None:
    results = [started("key", "generate", "k", "--json"), started("sign", make("sql"), "--key", "k.key", "--json")]
    assert stat.S_IMODE((tmp_path / "k.key").stat().st_mode) == 0o600
    secret = (tmp_path / "k.key").read_text().splitlines()[1]
    assert all(secret not in result.stdout + result.stderr for result in results)
    assert "exists" in started("key", "generate", "k", code=2).stderr
    (tmp_path / "k.key").chmod(0o644)
    result = started("sign", "sql", "--key", "k.key", code=8)
    assert "others can read it" in result.stderr
    assert secret not in result.stderr


def test_a_passphrase_comes_from_stdin_or_a_terminal_and_is_checked(run: Run, started: Run, make: Make, tmp_path: Path) -> None:
    keys.generate(tmp_path / "k", passphrase=b"correct horse")
    assert "BEGIN ENCRYPTED PRIVATE KEY" in (tmp_path / "k.key").read_text()
    make("sql")

    def sign(text: str, key: str = "k.key") -> str:
        words = [sys.executable, "-m", "adapterhub", "sign", "sql", "--key", key, "--passphrase-stdin"]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("", "converters", "schemas"))}
        result = subprocess.run(words, input=text, cwd=tmp_path, env=env, check=False, capture_output=True, text=True)
        assert "horse" not in result.stdout + result.stderr
        return result.stderr

    assert sign("correct horse\n") == ""
    assert "is not that of k.key" in sign("wrong horse\n")
    assert "is empty" in sign("\n")
    keys.generate(tmp_path / "plain")
    assert "plain.key is not encrypted" in sign("correct horse", "plain.key")
    assert "there is no terminal to ask on" in started("sign", "sql", "--key", "k.key", code=2).stderr
    with pytest.raises(AdapterhubError, match="is not that of") as error:
        keys.read_private(tmp_path / "k.key", b"wrong horse")
    assert "horse" not in str(error.value)
    assert keys.read_private(tmp_path / "k.key", b"correct horse").public.kind == "p256"


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("pkcs11:", "does not name a library, a token and a key"),
        ("pkcs11:token=team;object=k", "does not name a library, a token and a key"),
        ("pkcs11:object=k?module-path=/x.so", "does not name a library, a token and a key"),
        ("pkcs11:token=team?module-path=/x.so", "does not name a library, a token and a key"),
        ("pkcs11:token=team;token=other;object=k?module-path=/x.so", "'token' is given twice"),
        ("pkcs11:token=team;object=k?module-path=/x.so&pin-value=1234", "a PIN in a URI ends up in logs"),
        ("pkcs11:pin-value=1234;token?module-path=/x.so", "a PIN in a URI ends up in logs"),
        (
            "pkcs11:token=team;type=private;object=k?module-path=/x.so",
            "'type' is not supported, only token, serial, object, id",
        ),
        ("pkcs11:token=team;object=k?module-name=x", "'module-name' is not supported, only module-path"),
        ("pkcs11:token=%ff;object=k?module-path=/x.so", "is not UTF-8"),
        ("pkcs11:token=team;object?module-path=/x.so", "'object' has no value"),
    ],
)
def test_a_uri_that_names_no_one_key_in_hardware_is_refused_before_a_library_is_loaded(uri: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        signers.read(uri, b"1234")
    assert error.value.what == words
    assert "1234" not in str(error.value)
    assert error.value.hint


def test_a_key_of_an_unknown_kind_is_not_made_and_an_encrypted_one_needs_its_passphrase(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="kind: unknown kind of key 'rsa'. Known kinds: p256, p384, p521, ed25519"):
        keys.generate(tmp_path / "k", "rsa")
    assert not list(tmp_path.iterdir())
    secret, _ = keys.generate(tmp_path / "k", passphrase=b"correct horse")
    with pytest.raises(ParameterError, match=f"passphrase: {secret} is encrypted. Pass its passphrase") as error:
        keys.read_private(secret)
    assert error.value.code == "passphrase-required"


def test_a_policy_cannot_name_the_same_keys_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_MAX_KEYS", 3)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        keys.generate(tmp_path / name / "1", "ed25519")
        keys.generate(tmp_path / name / "2", "ed25519")
    assert len(keys.read_trusted([tmp_path / "a"] * 3)) == 2
    with pytest.raises(UsageError, match="4 keys, over the limit of 3"):
        keys.read_trusted([tmp_path / "a", tmp_path / "b"])

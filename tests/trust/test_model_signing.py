"""What is signed here is verified by OpenSSF's own program, and the reverse."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from adapterhub.trust import keys
from tests.conftest import Run, need_program
from tests.support.adapters import Make
from tests.support.signing import model_signing, payload_of, resign

pytestmark = pytest.mark.peer
CURVES = ("p256", "p384", "p521")


@pytest.fixture(params=CURVES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    secret, public = keys.generate(tmp_path / "signer", request.param)
    return secret, Path(public.source)


def test_model_signing_verifies_what_is_signed_here(run: Run, make: Make, pair: tuple[Path, Path]) -> None:
    folder = make("sql")
    (folder / "more").mkdir()
    (folder / "more" / "notes.md").write_text("notes")
    (folder / "more.md").write_text("sorts between the folder and what is in it")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    run("sign", folder, "--key", pair[0])
    assert model_signing("verify", pair[1], folder) == ""
    (folder / "README.md").write_text("another")
    assert "Hash mismatch for 'README.md'" in model_signing("verify", pair[1], folder)


def test_what_model_signing_signs_is_verified_here(run: Run, make: Make, pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = make("sql")
    assert model_signing("sign", pair[0], folder) == ""
    assert "every byte matches, signed as sql" in run("verify", folder, "--key", pair[1]).stdout
    (folder / "README.md").write_text("another")
    assert "README.md (changed)" in run("verify", folder, "--key", pair[1], code=1).stdout


def test_a_version_that_was_pulled_with_its_signature_is_verified_by_model_signing(
    run: Run, make: Make, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    run("push", make("sql"), "team/sql")
    run("sign", "team/sql", "--key", pair[0])
    run("pull", "team/sql", "-o", "out", "--require-signature", "--key", pair[1])
    assert model_signing("verify", pair[1], tmp_path / "out") == ""


def test_both_write_the_same_statement_of_the_same_files(run: Run, make: Make, tmp_path: Path) -> None:
    folder, secret = make("sql"), keys.generate(tmp_path / "signer")[0]
    run("sign", folder, "--key", secret)
    ours = payload_of(folder / "model.sig")
    model_signing("sign", secret, folder)
    theirs = payload_of(folder / "model.sig")
    for statement in (ours, theirs):
        del statement["predicate"]["serialization"]["ignore_paths"]  # theirs are in no order
    assert ours == theirs


def test_keys_of_openssl_are_read(run: Run, make: Make, tmp_path: Path) -> None:
    openssl, folder = need_program("openssl"), make("sql")
    words = [openssl, "ecparam", "-name", "secp384r1", "-genkey", "-noout", "-out", "k.key"]
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "k.key").chmod(0o600)
    subprocess.run([openssl, "ec", "-in", "k.key", "-pubout", "-out", "k.pub"], cwd=tmp_path, check=True, capture_output=True)
    run("sign", folder, "--key", "k.key")
    run("verify", folder, "--key", "k.pub")
    assert model_signing("verify", tmp_path / "k.pub", folder) == ""


def test_model_signing_signs_with_a_key_that_a_passphrase_encrypts(run: Run, make: Make, tmp_path: Path) -> None:
    folder, (secret, public) = make("sql"), keys.generate(tmp_path / "k", passphrase=b"correct horse")
    assert model_signing("sign", secret, folder, "wrong horse") != ""
    assert model_signing("sign", secret, folder, "correct horse") == ""
    run("verify", folder, "--key", public.source)


def test_model_signing_reads_no_ed25519_which_is_said_where_one_is_made(run: Run, make: Make, tmp_path: Path) -> None:
    folder = make("sql")
    assert "model_signing cannot verify" in run("key", "generate", "k", "--curve", "ed25519").stderr
    run("sign", folder, "--key", "k.key")
    run("verify", folder, "--key", "k.pub")
    assert model_signing("verify", tmp_path / "k.pub", folder) != ""


def test_what_would_pass_there_by_leaving_out_files_is_refused_here(run: Run, make: Make, tmp_path: Path) -> None:
    """A statement may name paths to ignore, and theirs takes its word for the weights too."""
    folder, (secret, public) = make("sql"), keys.generate(tmp_path / "signer")
    run("sign", folder, "--key", secret)

    def without_weights(statement: dict[str, dict[str, dict[str, list[str]]]]) -> None:
        statement["predicate"]["serialization"]["ignore_paths"].append("adapter_model.safetensors")

    resign(folder / "model.sig", keys.read_private(secret), without_weights)
    run("verify", folder, "--key", public.source)  # it is signed all the same
    (folder / ".gitignore").write_text("covered by neither")
    run("verify", folder, "--key", public.source)
    (folder / "more.safetensors").write_bytes(b"not signed")
    assert "more.safetensors (not signed)" in run("verify", folder, "--key", public.source, code=1).stdout

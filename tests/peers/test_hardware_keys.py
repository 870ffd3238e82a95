"""Keys in hardware: SoftHSM signs by PKCS #11, and what it signs is verified as what a key in a file signs."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import adapterhub as ah
from adapterhub.trust import attestation, bundle, keys, signers
from adapterhub.trust.attestation import TYPES, Attestation
from adapterhub.trust.statement import Statement
from adapterhub_converters.errors import AdapterhubError, LocalIOError, NotFoundError, ParameterError
from tests.conftest import need_program
from tests.support.adapters import Make
from tests.support.environments import environment
from tests.support.signing import model_signing

pytestmark = pytest.mark.peer
PIN, DIGEST = b"1234", "sha256:" + "a" * 64
LIBRARY = "/usr/lib/softhsm/libsofthsm2.so"


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a token `team`, with a key of each curve, and their public keys."""
    util, folder = need_program("softhsm2-util"), tmp_path_factory.mktemp("hsm")
    python = environment("python-pkcs11==0.10.1")
    (folder / "tokens").mkdir()
    (folder / "softhsm2.conf").write_text(f"directories.tokendir = {folder}/tokens\nobjectstore.backend = file\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTHSM2_CONF", str(folder / "softhsm2.conf"))
        (site,) = (python.parent.parent / "lib").glob("python*/site-packages")
        patch.setattr(sys, "path", [*sys.path, str(site)])
        importlib.invalidate_caches()

        def call(*words: str) -> None:
            subprocess.run([util, *words], check=True, capture_output=True)

        call("--init-token", "--free", "--label", "team", "--pin", PIN.decode(), "--so-pin", "5678")
        for number, kind in enumerate(("p256", "p384", "p521"), 1):
            secret, _ = keys.generate(folder / kind, kind)
            words = ("--token", "team", "--label", kind, "--id", f"0{number}", "--pin", PIN.decode())
            call("--import", str(secret), *words)
            secret.unlink()
        yield folder


def uri(key: str, token: str = "token=team", library: str = LIBRARY) -> str:
    return f"pkcs11:{token};{key}?module-path={library}"


@pytest.mark.parametrize("kind", ["p256", "p384", "p521"])
def test_what_hardware_signs_is_verified_with_its_public_key(token: Path, make: Make, kind: str) -> None:
    folder = make("sql")
    signature = ah.sign(folder, uri(f"object={kind}"), passphrase=PIN)
    assert (signature.signer.kind, signature.signer.id) == (kind, keys.read_public(token / f"{kind}.pub").id)
    assert ah.verify(folder, keys=token / f"{kind}.pub").ok
    assert model_signing("verify", token / f"{kind}.pub", folder) == ""


def test_a_key_is_named_by_its_id_too_and_attests(token: Path) -> None:
    key = signers.read(uri("id=%01"), PIN)
    trusted = [keys.read_public(token / "p256.pub")]
    raw = Attestation(TYPES["fits"], "team/sql", DIGEST, {}).sign(key)
    assert attestation.find_accepted([raw], "fits", trusted, DIGEST, "x").signer.id == key.public.id
    assert bundle.verify(bundle.sign(Statement("sql", {"a": DIGEST}), key), trusted, "x").statement.name == "sql"


@pytest.mark.parametrize(
    ("text", "pin", "error", "words"),
    [
        (uri("object=p256"), None, ParameterError, "needs its PIN"),
        (uri("object=p256"), b"wrong", ParameterError, "is not the PIN of"),
        (uri("object=none"), PIN, NotFoundError, "no such token, or no such key on it"),
        (uri("object=p256", "token=none"), PIN, NotFoundError, "no such token"),
        (uri("object=p256", library="/nowhere.so"), PIN, LocalIOError, "cannot open shared object file"),
    ],
)
def test_what_cannot_sign_is_an_error_of_one_line_without_the_pin(
    token: Path, text: str, pin: bytes | None, error: type[AdapterhubError], words: str
) -> None:
    with pytest.raises(error) as caught:
        signers.read(text, pin)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "wrong" not in str(caught.value)

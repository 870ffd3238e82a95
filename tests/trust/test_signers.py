"""Signers by path or by the URI of a key in hardware: a URI that says too little, too much or a PIN is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub.trust import keys, signers
from adapterhub_converters.errors import ParameterError, UsageError

URI = "pkcs11:token=team;object=release?module-path=/usr/lib/none.so"


def test_a_path_is_a_private_key_and_a_signer_is_itself(tmp_path: Path) -> None:
    secret, public = keys.generate(tmp_path / "team")
    signer = signers.read(secret)
    assert isinstance(signer, keys.PrivateKey)
    assert signer.public.id == public.id
    assert signers.read(signer) is signer


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        (URI.replace("token=team;", ""), "does not name a library, a token and a key"),
        (URI.replace(";object=release", ""), "does not name a library, a token and a key"),
        (URI.partition("?")[0], "does not name a library, a token and a key"),
        (f"{URI}&slot-id=1", "'slot-id' is not supported"),
        (URI.replace("object=release", "object=release;object=other"), "'object' is given twice"),
        (URI.replace("object=release", "object"), "'object' has no value"),
        (URI.replace("team", "%ff"), "is not UTF-8"),
    ],
)
def test_a_uri_that_cannot_be_meant_is_refused(uri: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        signers.read(uri, b"1234")


def test_a_pin_in_a_uri_is_refused_and_not_repeated() -> None:
    with pytest.raises(UsageError, match="a PIN in a URI ends up in logs") as caught:
        signers.read(f"{URI}&pin-value=97531")
    assert "97531" not in f"{caught.value} {caught.value.hint}"


def test_a_key_in_hardware_asks_for_its_pin_before_a_library_is_loaded() -> None:
    with pytest.raises(ParameterError, match="needs its PIN") as caught:
        signers.read(URI)
    assert caught.value.code == "passphrase-required"

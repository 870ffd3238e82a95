"""Keys of signers: each kind signs and verifies, a private key is its owner's, and one file has one key."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from adapterhub.identity import Identity
from adapterhub.trust import keys
from adapterhub_converters.errors import (
    AdapterhubError,
    FormatError,
    NotFoundError,
    OutputExistsError,
    ParameterError,
    RefusedError,
)


@pytest.mark.parametrize("kind", keys.KINDS)
def test_a_key_of_each_kind_signs_and_verifies_after_it_was_read_again(tmp_path: Path, kind: str) -> None:
    secret, public = keys.generate(tmp_path / "team", kind)
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    signature = keys.read_private(secret).sign(b"files")
    read_again = keys.read_public(tmp_path / "team.pub")
    assert (read_again.kind, read_again.id) == (kind, public.id)
    assert read_again.verifies(signature, b"files")
    assert not read_again.verifies(signature, b"other files")
    assert not keys.generate(tmp_path / "other", kind)[1].verifies(signature, b"files")


def test_a_pair_is_written_whole_and_over_nothing(tmp_path: Path) -> None:
    (tmp_path / "team.pub").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"team\.pub"):
        keys.generate(tmp_path / "team")
    assert [path.name for path in tmp_path.iterdir()] == ["team.pub"]
    with pytest.raises(ParameterError, match="p256, p384, p521, ed25519"):
        keys.generate(tmp_path / "other", "rsa")


def test_a_passphrase_is_required_where_there_is_one_and_nowhere_else(tmp_path: Path) -> None:
    locked, _ = keys.generate(tmp_path / "locked", passphrase=b"open sesame")
    plain, _ = keys.generate(tmp_path / "plain")
    assert keys.read_private(locked, b"open sesame").public.kind == "p256"
    for path, passphrase, problem in (
        (locked, None, "is encrypted"),
        (locked, b"other", "is not that of"),
        (plain, b"other", "is not encrypted"),
    ):
        with pytest.raises(ParameterError, match=problem):
            keys.read_private(path, passphrase)


def test_a_public_key_is_one_block_and_never_a_private_key(tmp_path: Path) -> None:
    secret, public = keys.generate(tmp_path / "team")
    cases: list[tuple[str, type[AdapterhubError], str]] = [
        ("", NotFoundError, "no such key"),
        ("ssh-ed25519 AAAA", FormatError, "0 keys in PEM"),
        (public.pem.decode() * 2, FormatError, "2 keys in PEM"),
        (secret.read_text(), RefusedError, "a private key, where a public one is required"),
        ("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", FormatError, "not a public key in PEM"),
    ]
    for text, error, problem in cases:
        with pytest.raises(error, match=problem):
            keys.parse_public(text, "team.pub")


def test_a_folder_of_keys_has_each_key_once_and_identities_stay(tmp_path: Path) -> None:
    _, first = keys.generate(tmp_path / "a")
    _, second = keys.generate(tmp_path / "b", "ed25519")
    (tmp_path / "copy.pem").write_bytes(first.pem)
    ana = Identity("ana@example.com", "https://accounts.example.com")
    signers = keys.read_trusted([tmp_path, tmp_path / "a.pub", ana])
    assert [signer.id for signer in signers if isinstance(signer, keys.PublicKey)] == [first.id, second.id]
    assert signers[-1] == ana

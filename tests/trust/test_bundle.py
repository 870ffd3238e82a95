"""Bundles: a signature by a trusted key gives the statement back; forms that could be read in two ways are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub.trust import bundle, keys
from adapterhub.trust.statement import Statement
from adapterhub_converters.errors import FormatError, IntegrityError

FILES = {"adapter_model.safetensors": f"sha256:{'a' * 64}"}


@pytest.fixture
def team(tmp_path: Path) -> keys.PrivateKey:
    return keys.read_private(keys.generate(tmp_path / "team")[0])


def test_a_signed_statement_comes_back_with_its_signer(team: keys.PrivateKey) -> None:
    raw = bundle.sign(Statement("sql", FILES), team)
    public = team.public
    signed = bundle.verify(raw, [public], "sql")
    assert (signed.statement.files, signed.signer, signed.raw) == (FILES, public, raw)
    assert bundle.claimed_signer(raw, "sql") == f"the key {team.public.id[:16]}…"


def test_a_bundle_by_another_key_is_not_accepted(team: keys.PrivateKey, tmp_path: Path) -> None:
    raw = bundle.sign(Statement("sql", FILES), team)
    _, other_key = keys.generate(tmp_path / "other")
    with pytest.raises(IntegrityError, match="which is not accepted") as caught:
        bundle.verify(raw, [other_key], "sql")
    assert caught.value.code == "signature"
    renamed = raw.replace(team.public.id.encode(), other_key.id.encode())  # the hint is no proof
    with pytest.raises(IntegrityError, match="the signature is not by the key"):
        bundle.verify(renamed, [other_key], "sql")


def _second_signature(document: dict[str, Any]) -> None:
    document["dsseEnvelope"]["signatures"] *= 2


def _key_along(document: dict[str, Any]) -> None:
    document["verificationMaterial"]["publicKey"]["rawBytes"] = "AAAA"


def _certificate_along(document: dict[str, Any]) -> None:
    document["verificationMaterial"]["certificate"] = {"rawBytes": "AAAA"}


def _other_payload(document: dict[str, Any]) -> None:
    document["dsseEnvelope"]["payloadType"] = "text/plain"


def _other_spelling(document: dict[str, Any]) -> None:
    document["dsseEnvelope"]["payload"] += "\n"


def _another_type(document: dict[str, Any]) -> None:
    document["mediaType"] = "application/vnd.dev.sigstore.bundle+json;version=0.1"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_second_signature, "not exactly one signature"),
        (_key_along, "'rawBytes' has no place"),
        (_certificate_along, "'publicKey' has no place"),
        (_other_payload, "a payload of the type 'text/plain'"),
        (_other_spelling, "'payload' is not base64 in its canonical form"),
        (_another_type, "a bundle of the type"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(
    team: keys.PrivateKey, change: Callable[[dict[str, Any]], None], problem: str
) -> None:
    document = json.loads(bundle.sign(Statement("sql", FILES), team))
    change(document)
    with pytest.raises(FormatError, match=problem):
        bundle.verify(json.dumps(document).encode(), [team.public], "sql")


def test_of_several_signatures_one_that_covers_files_and_name_is_enough(team: keys.PrivateKey, tmp_path: Path) -> None:
    stranger = keys.read_private(keys.generate(tmp_path / "stranger")[0])
    good, by_stranger = (bundle.sign(Statement("sql", FILES), key) for key in (team, stranger))
    stale = bundle.sign(Statement("sql", {"old.txt": f"sha256:{'b' * 64}"}), team)
    assert bundle.find_accepted([by_stranger, stale, good], [team.public], FILES, "team/sql", "sql").raw == good
    with pytest.raises(IntegrityError, match="none of its 2 signatures is accepted"):
        bundle.find_accepted([by_stranger, stale], [team.public], FILES, None, "sql")
    with pytest.raises(IntegrityError, match="is not signed") as caught:
        bundle.find_accepted([], [team.public], FILES, None, "sql")
    assert caught.value.code == "signature-missing"

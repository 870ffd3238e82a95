"""Attestations of others: replayed, altered, of an unknown kind or by another key, they count for nothing and do no harm."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub.trust import attestation, bundle, keys
from adapterhub.trust.attestation import FITS, TYPES, Attestation
from adapterhub.trust.statement import Statement
from adapterhub_converters.errors import AdapterhubError, FormatError, IntegrityError

DIGEST, OTHER = (f"sha256:{digit * 64}" for digit in "ab")
GOOD = Attestation(TYPES[FITS], "team/sql", DIGEST, {"verdicts": {"vllm": {"verdict": "refused"}}})


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> keys.PrivateKey:
    return keys.read_private(keys.generate(tmp_path_factory.mktemp("keys") / "ci")[0])


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> keys.PrivateKey:
    return keys.read_private(keys.generate(tmp_path_factory.mktemp("keys") / "stranger")[0])


def altered(raw: bytes) -> bytes:
    """Another predicate under the same signature."""
    document = json.loads(raw)
    payload = base64.b64decode(document["dsseEnvelope"]["payload"]).replace(b"refused", b"applied")
    document["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    return json.dumps(document).encode()


def claiming(raw: bytes, key: keys.PublicKey) -> bytes:
    """A bundle that names another key than the one that signed it."""
    document = json.loads(raw)
    document["verificationMaterial"]["publicKey"]["hint"] = key.id
    return json.dumps(document).encode()


Attack = Callable[[keys.PrivateKey, keys.PrivateKey], bytes]
ATTACKS: dict[str, tuple[Attack, str]] = {
    "another subject": (
        lambda ci, _: Attestation(GOOD.type, GOOD.name, OTHER, GOOD.predicate).sign(ci),
        "the attestation is about sha256:bbbbbbbbbbbb…, not about sha256:aaaaaaaaaaaa…",
    ),
    "altered predicate": (lambda ci, _: altered(GOOD.sign(ci)), "the signature is not by the key"),
    "unknown predicate": (
        lambda ci, _: Attestation("urn:example:safe:1", GOOD.name, DIGEST, GOOD.predicate).sign(ci),
        "attests 'urn:example:safe:1', which is not known here",
    ),
    "another kind": (
        lambda ci, _: Attestation(TYPES["training"], GOOD.name, DIGEST, GOOD.predicate).sign(ci),
        "attests training, not fits",
    ),
    "wrong key": (lambda _, other_key: GOOD.sign(other_key), "which is not accepted"),
    "wrong key under a good name": (
        lambda ci, other_key: claiming(GOOD.sign(other_key), ci.public),
        "the signature is not by the key",
    ),
    "nothing": (lambda *_: b"", "has no attestation 'fits'"),
    "a signature of files": (
        lambda ci, _: bundle.sign(Statement("team/sql", {"a": DIGEST}), ci),
        "has no attestation 'fits'",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_is_no_good_attestation_is_refused_by_name_and_does_no_harm(
    secret: keys.PrivateKey, stranger: keys.PrivateKey, attack: str
) -> None:
    make, expected = ATTACKS[attack]
    raw = make(secret, stranger)
    with pytest.raises(IntegrityError) as error:
        attestation.find_accepted([raw], FITS, [secret.public], DIGEST, "team/sql")
    assert expected in error.value.what
    accepted = attestation.find_accepted([raw, GOOD.sign(secret)], FITS, [secret.public], DIGEST, "team/sql")
    assert accepted.attestation == GOOD


def test_an_attestation_that_a_policy_does_not_take_leaves_the_next_one(secret: keys.PrivateKey) -> None:
    def check(candidate: Attestation) -> None:
        if candidate.predicate.get("base") is None:
            raise IntegrityError("team/sql", "is about another base")

    better = Attestation(GOOD.type, GOOD.name, DIGEST, {"base": {}})
    signed = [claim.sign(secret) for claim in (GOOD, better)]
    assert attestation.find_accepted(signed, FITS, [secret.public], DIGEST, "team/sql", check=check).attestation == better
    with pytest.raises(IntegrityError, match="that is accepted, of 1: is about another base"):
        attestation.find_accepted(signed[:1], FITS, [secret.public], DIGEST, "team/sql", check=check)


def test_an_attestation_signs_no_files(secret: keys.PrivateKey) -> None:
    with pytest.raises(IntegrityError, match="is not signed"):
        bundle.find_accepted([GOOD.sign(secret)], [secret.public], {"a": DIGEST}, None, "team/sql")
    with pytest.raises(FormatError):
        bundle.verify(GOOD.sign(secret), [secret.public], "team/sql")


FORMS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "later": (
        lambda s: s.update(_type="https://in-toto.io/Statement/v2"),
        "does not attest a statement of the type https://in-toto.io/Statement/v1",
    ),
    "no type": (
        lambda s: s.update(predicateType=None),
        "does not attest a statement of the type https://in-toto.io/Statement/v1",
    ),
    "no subject": (lambda s: s.update(subject=[]), "exactly one subject"),
    "two subjects": (lambda s: s["subject"].append(s["subject"][0]), "exactly one subject"),
    "subject of text": (lambda s: s.update(subject=["x"]), "exactly one subject"),
    "sha1": (lambda s: s["subject"][0].update(digest={"sha1": "a" * 40}), "whose digest is not sha256 alone"),
    "two digests": (lambda s: s["subject"][0]["digest"].update(sha512="a" * 128), "whose digest is not sha256 alone"),
    "capitals": (lambda s: s["subject"][0].update(digest={"sha256": "A" * 64}), "whose digest is not sha256 alone"),
    "no predicate": (lambda s: s.pop("predicate"), "predicate is not an object"),
    "a list": (lambda s: s.update(predicate=[]), "predicate is not an object"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_statement_of_another_form_is_refused_though_the_key_is_trusted(secret: keys.PrivateKey, form: str) -> None:
    change, expected = FORMS[form]
    document = json.loads(GOOD.dump())
    change(document)
    raw = bundle.sign_payload(json.dumps(document).encode(), secret, "x")
    with pytest.raises(FormatError) as error:
        attestation.verify(raw, [secret.public], "x")
    assert expected in error.value.what


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"[" * 100_000, b'{"predicateType": {}}', b"\xff"])
def test_what_is_no_statement_is_an_error_of_one_line(raw: bytes, secret: keys.PrivateKey) -> None:
    with pytest.raises(AdapterhubError) as error:
        attestation.parse(raw, "x")
    assert "\n" not in str(error.value)
    assert attestation.attestation_bundles([raw]) == [raw]  # for the reason why it is not accepted


def test_a_base_that_is_not_named_is_none() -> None:
    for base in (None, "x", {}, {"fingerprint": 3}):
        assert attestation.base_fingerprint(Attestation(TYPES[FITS], "x", DIGEST, {"base": base})) == ""


def test_an_attestation_whose_claims_are_text_of_others_is_shown_as_one_harmless_line(
    tmp_path: Path, secret: keys.PrivateKey
) -> None:
    hostile = Attestation("\x1b[31m\nurn:x", "\x1b[2J", DIGEST, {})
    with pytest.raises(IntegrityError) as error:
        attestation.find_accepted([hostile.sign(secret)], FITS, [secret.public], DIGEST, "team/sql")
    assert "\x1b" not in str(error.value)
    assert "\n" not in str(error.value)

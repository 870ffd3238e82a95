"""Bundles, statements and keys of another form are refused, though the key is trusted."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from adapterhub.trust import bundle, keys
from adapterhub.trust.statement import Statement
from adapterhub_converters.errors import AdapterhubError, FormatError, IntegrityError, RefusedError
from tests.conftest import Run
from tests.support.adapters import Make
from tests.support.signing import resign

FILES = {"a.txt": "sha256:" + "a" * 64, "b/c.txt": "sha256:" + "b" * 64}


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


def _edit(change: Callable[[Any], object]) -> Callable[[bytes], bytes]:
    def edited(raw: bytes) -> bytes:
        document = json.loads(raw)
        change(document)
        return json.dumps(document).encode()

    edited.__name__ = change.__name__
    return edited


def _in(*path: str | int, value: object) -> Callable[[bytes], bytes]:
    def change(document: Any) -> None:
        for name in path[:-1]:
            document = document[name]
        document[path[-1]] = value

    return _edit(change)


def _twice(document: Any) -> None:
    document["dsseEnvelope"]["signatures"] *= 2


def _with_a_log_that_is_no_list(document: Any) -> None:
    document["verificationMaterial"]["tlogEntries"] = {"logIndex": 1}


def _of_its_own_key(document: Any) -> None:
    document["verificationMaterial"]["publicKey"]["rawBytes"] = "AAAA"


def _with_a_certificate(document: Any) -> None:
    document["verificationMaterial"] = {"certificate": {"rawBytes": "AAAA"}, "tlogEntries": []}


def _over_a_blob(document: Any) -> None:
    document["messageSignature"] = document.pop("dsseEnvelope")


def _without_a_payload(document: Any) -> None:
    del document["dsseEnvelope"]["payload"]


def _without_a_type(document: Any) -> None:
    del document["mediaType"]


def _with_spaces(document: Any) -> None:
    document["dsseEnvelope"]["payload"] += "\n"


def _url_safe(document: Any) -> None:
    sig = base64.b64decode(document["dsseEnvelope"]["signatures"][0]["sig"])
    document["dsseEnvelope"]["signatures"][0]["sig"] = base64.urlsafe_b64encode(sig + b"\xff\xff\xff").decode()


_ENVELOPE, _SIGNATURE = ("dsseEnvelope",), ("dsseEnvelope", "signatures", 0)
BUNDLES = {
    "no type": (_edit(_without_a_type), "not a bundle: it has no 'mediaType'"),
    "older": (_in("mediaType", value="application/vnd.dev.sigstore.bundle+json;version=0.2"), "a bundle of the type"),
    "unsigned": (_in(*_ENVELOPE, "signatures", value=[]), "not exactly one signature"),
    "signed twice": (_edit(_twice), "not exactly one signature"),
    "empty signature": (_in(*_SIGNATURE, "sig", value=""), "'sig' is not base64 in its canonical form"),
    "none": (_in(*_SIGNATURE, "sig", value=None), "'sig' is not base64 in its canonical form"),
    "no payload": (_edit(_without_a_payload), "the bundle has no 'payload'"),
    "no envelope": (_in(*_ENVELOPE, value=[]), "not a bundle: one of its parts is not an object"),
    "key of its own": (_edit(_of_its_own_key), "'rawBytes' has no place"),
    "key id": (_in(*_SIGNATURE, "keyid", value="other"), "does not name its key"),
    "no key": (_in("verificationMaterial", "publicKey", "hint", value=""), "does not name its key"),
    "certificate": (_edit(_with_a_certificate), "has not exactly one entry of a transparency log"),
    "log": (_edit(_with_a_log_that_is_no_list), "'tlogEntries' is not a list"),
    "message": (_edit(_over_a_blob), "'messageSignature' has no place"),
    "another type": (_in(*_ENVELOPE, "payloadType", value="text/plain"), "a payload of the type 'text/plain'"),
    "type in capitals": (_in(*_ENVELOPE, "payloadType", value="application/vnd.in-toto+JSON"), "a payload of the type"),
    "spaces": (_edit(_with_spaces), "'payload' is not base64"),
    "another alphabet": (_edit(_url_safe), "'sig' is not base64"),
    "algorithm": (_in("verificationMaterial", "keyDetails", value="PKIX_RSA_PKCS1V5"), "'keyDetails' has no place"),
    "a list": (lambda _: b"[]", "not a JSON object"),
    "key twice": (lambda raw: raw.replace(b"{", b'{"mediaType":"x",', 1), "duplicate key"),
    "nothing": (lambda _: b"", ""),
    "deep": (lambda _: b"[" * 100_000, ""),
    "large": (lambda raw: raw + b" " * bundle.MAX_BUNDLE, "a signature of over"),
}


@pytest.mark.parametrize("attack", BUNDLES)
def test_a_bundle_of_another_form_is_refused(secret: keys.PrivateKey, attack: str) -> None:
    change, expected = BUNDLES[attack]
    raw = change(bundle.sign(Statement("sql", FILES), secret))
    with pytest.raises((FormatError, RefusedError)) as error:
        bundle.verify(raw, [secret.public], "model.sig")
    assert expected in error.value.what, error.value.what
    assert error.value.hint


def test_a_payload_that_was_changed_is_refused_before_it_is_parsed(secret: keys.PrivateKey) -> None:
    raw = _in(*_ENVELOPE, "payload", value=base64.b64encode(b"not JSON").decode())(bundle.sign(Statement("sql", FILES), secret))
    with pytest.raises(IntegrityError, match="the signature is not by the key"):
        bundle.verify(raw, [secret.public], "model.sig")


def _statement(**changes: object) -> Callable[[Any], object]:
    return lambda statement: statement.update(changes)


def _predicate(**changes: object) -> Callable[[Any], object]:
    return lambda statement: statement["predicate"].update(changes)


def _serialization(**changes: object) -> Callable[[Any], object]:
    return lambda statement: statement["predicate"]["serialization"].update(changes)


def _resource(**changes: object) -> Callable[[Any], object]:
    return lambda statement: statement["predicate"]["resources"][0].update(changes)


STATEMENTS = {
    "v0.2": (_statement(predicateType="https://model_signing/Digests/v0.1"), "signs 'https://model_signing/Digests/v0.1'"),
    "provenance": (_statement(predicateType="https://slsa.dev/provenance/v1"), "signs 'https://slsa.dev/provenance/v1'"),
    "older statement": (
        _statement(_type="https://in-toto.io/Statement/v0.1"),
        "does not sign a statement of the type https://in-toto.io/Statement/v1",
    ),
    "no subject": (_statement(subject=[]), "exactly one subject"),
    "other root": (lambda s: s["subject"][0].update(digest={"sha256": "0" * 64}), "the digest of its subject"),
    "two digests": (lambda s: s["subject"][0]["digest"].update(sha1="0"), "the digest of its subject"),
    "nameless": (lambda s: s["subject"][0].update(name=""), "without a name"),
    "no files": (_predicate(resources=[]), "signs no files"),
    "shards": (_serialization(method="shards", shard_size=1), "signs 'shards', not whole files"),
    "sha1": (_serialization(hash_type="sha1"), "has digests by 'sha1'"),
    "blake2": (_serialization(hash_type="blake2"), "has digests by 'blake2'"),
    "other algorithm": (_resource(algorithm="md5"), "not a sha256 digest"),
    "short digest": (_resource(digest="00"), "not a sha256 digest"),
    "twice": (lambda s: s["predicate"]["resources"].append(s["predicate"]["resources"][0]), "signs the file 'a.txt' twice"),
    "no name": (_resource(name=7), "signs a file without a name, or with one of over"),
}


@pytest.mark.parametrize("attack", STATEMENTS)
def test_a_statement_of_another_form_is_refused_though_the_key_is_trusted(
    tmp_path: Path, secret: keys.PrivateKey, attack: str
) -> None:
    change, expected = STATEMENTS[attack]
    signature = tmp_path / "model.sig"
    signature.write_bytes(bundle.sign(Statement("sql", FILES), secret))
    resign(signature, secret, change)
    with pytest.raises(FormatError) as error:
        bundle.verify(signature.read_bytes(), [secret.public], "model.sig")
    assert expected in error.value.what, error.value.what
    assert error.value.hint == "Have it signed again"


def test_the_signature_of_another_key_is_refused_whatever_its_hint(tmp_path: Path, secret: keys.PrivateKey) -> None:
    other_key = keys.read_private(keys.generate(tmp_path / "other")[0])
    raw = bundle.sign(Statement("sql", FILES), other_key)
    with pytest.raises(IntegrityError, match="which is not accepted"):
        bundle.verify(raw, [secret.public], "model.sig")
    forged = _in("verificationMaterial", "publicKey", "hint", value=secret.public.id)(raw)
    with pytest.raises(IntegrityError, match="the signature is not by the key"):
        bundle.verify(forged, [secret.public], "model.sig")


@pytest.mark.parametrize("kind", keys.KINDS)
def test_a_signature_by_another_algorithm_is_refused(tmp_path: Path, secret: keys.PrivateKey, kind: str) -> None:
    """The algorithm is that of the key that is trusted: the same key with another hash is no signature."""
    trusted = keys.read_private(keys.generate(tmp_path / "trusted", kind)[0])
    raw = bundle.sign(Statement("sql", FILES), secret)
    forged = _in("verificationMaterial", "publicKey", "hint", value=trusted.public.id)(raw)
    with pytest.raises(IntegrityError, match="the signature is not by the key"):
        bundle.verify(forged, [trusted.public], "model.sig")


def test_another_hash_with_the_same_key_is_refused(tmp_path: Path, pair: tuple[Path, Path], secret: keys.PrivateKey) -> None:
    key = serialization.load_pem_private_key(pair[0].read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    document = json.loads(bundle.sign(Statement("sql", FILES), secret))
    payload = base64.b64decode(document["dsseEnvelope"]["payload"])
    kind = document["dsseEnvelope"]["payloadType"].encode()
    message = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    before_1_0 = f"DSSEV1 {len(kind)} {kind.decode()} {len(payload)} {payload!r}".encode()  # which model_signing still takes
    for hash_, signed in ((hashes.SHA512(), message), (hashes.SHA256(), payload), (hashes.SHA256(), before_1_0)):
        sig = base64.b64encode(key.sign(signed, ec.ECDSA(hash_))).decode()
        with pytest.raises(IntegrityError, match="the signature is not by the key"):
            bundle.verify(_in(*_SIGNATURE, "sig", value=sig)(json.dumps(document).encode()), [secret.public], "model.sig")


def _pem(key: Any) -> bytes:
    pem: bytes = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return pem


KEYS: dict[str, tuple[Callable[[bytes, bytes], bytes], type[AdapterhubError], str]] = {
    "private": (lambda secret, _: secret, RefusedError, "a private key"),
    "rsa": (lambda *_: _pem(rsa.generate_private_key(65537, 2048)), RefusedError, "a key of the kind"),
    "another curve": (
        lambda *_: _pem(ec.generate_private_key(ec.SECP256K1())),
        RefusedError,
        "a key of the kind secp256k1, which is not supported",
    ),
    "two": (lambda _, public: public * 2, FormatError, "2 keys in PEM"),
    "none": (lambda *_: b"key", FormatError, "0 keys in PEM"),
    "damaged": (lambda _, public: public.replace(b"M", b"!"), FormatError, "not a public key in PEM"),
}


@pytest.mark.parametrize("attack", KEYS)
def test_what_is_no_public_key_of_a_known_kind_is_refused(tmp_path: Path, pair: tuple[Path, Path], attack: str) -> None:
    make_key, error, expected = KEYS[attack]
    (tmp_path / "k.pub").write_bytes(make_key(pair[0].read_bytes(), pair[1].read_bytes()))
    with pytest.raises(error) as caught:
        keys.read_trusted([tmp_path])
    assert expected in caught.value.what

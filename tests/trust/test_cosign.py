"""What cosign 2 stores is read in its own form alone, and never taken for a statement of another kind."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from adapterhub.trust import attestation, bundle, cosign, keys
from adapterhub.trust.attestation import TESTS, TYPES, Attestation
from adapterhub.trust.bundle import SIMPLE_SIGNING
from adapterhub_converters.errors import AdapterhubError, FormatError, IntegrityError
from tests.conftest import Run
from tests.support.adapters import Make

DIGEST = "sha256:" + "a" * 64
FILES = {"a.txt": "sha256:" + "b" * 64}
GOOD: dict[str, Any] = {
    "critical": {
        "identity": {"docker-reference": "registry.example/team/sql"},
        "image": {"docker-manifest-digest": DIGEST},
        "type": "cosign container image signature",
    },
    "optional": None,
}
ENVELOPE_TYPE = "application/vnd.dsse.envelope.v1+json"
CERTIFICATE = {"dev.sigstore.cosign/certificate": "-----BEGIN CERTIFICATE-----\nAAAA\nBBBB\n-----END CERTIFICATE-----\n"}


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> keys.PrivateKey:
    folder = tmp_path_factory.mktemp("keys")
    keys.generate(folder / "team")
    keys.generate(folder / "other")
    return keys.read_private(folder / "team.key")


def other_public_key(key: keys.PrivateKey) -> keys.PublicKey:
    return keys.read_public(Path(key.source).with_name("other.pub"))


def layer(media_type: str, **annotations: str) -> cosign.CosignLayer:
    return cosign.CosignLayer(media_type, DIGEST, 1, annotations)


def signature(key: keys.PrivateKey, payload: dict[str, Any]) -> bytes:
    """The bundle of a payload signed by cosign 2."""
    raw = json.dumps(payload).encode()
    annotations = {cosign.SIGNATURE_ANNOTATION: base64.b64encode(key.sign(raw)).decode()}
    return layer(SIMPLE_SIGNING, **annotations).bundle(raw)


def envelope(key: keys.PrivateKey, claim: Attestation) -> bytes:
    """The layer of an attestation of cosign 2."""
    return json.dumps(json.loads(claim.sign(key))["dsseEnvelope"]).encode()


def test_a_signature_is_of_one_manifest_for_every_name_by_a_trusted_key(key: keys.PrivateKey) -> None:
    raw = signature(key, GOOD)
    trusted = [other_public_key(key), key.public]
    assert bundle.predicate_type(raw) == bundle.COSIGN_TYPE
    assert bundle.find_accepted([raw], trusted, FILES, "team/sql", "x", digest=DIGEST).signer.id == key.public.id
    with pytest.raises(IntegrityError, match="by a key that it does not name, which is not accepted"):
        bundle.find_accepted([raw], [other_public_key(key)], FILES, "team/sql", "x", digest=DIGEST)
    with pytest.raises(IntegrityError, match="is not about"):
        bundle.find_accepted([raw], trusted, FILES, "team/sql", "x", digest="sha256:" + "c" * 64)
    with pytest.raises(AdapterhubError):  # a folder has no manifest, which alone is signed
        bundle.find_accepted([raw], trusted, FILES, None, "x")
    assert attestation.attestation_bundles([raw]) == []


def test_what_is_signed_for_cosign_is_of_one_manifest_for_every_name(key: keys.PrivateKey) -> None:
    raw = cosign.sign(DIGEST, "team/sql", key)
    assert bundle.find_accepted([raw], [key.public], FILES, "other/name", "x", digest=DIGEST).statement.name == ""
    with pytest.raises(IntegrityError, match="is not about"):
        bundle.find_accepted([raw], [key.public], FILES, "team/sql", "x", digest="sha256:" + "c" * 64)


def test_only_a_version_is_signed_for_cosign_by_a_key_and_for_no_name(run: Run, make: Make) -> None:
    run("key", "generate", "team")
    run("push", folder := make("sql"), "team/sql")
    assert "is a folder, and cosign signs versions" in run("sign", folder, "--key", "team.key", "--cosign", code=2).stderr
    words = ("sign", "team/sql", "--key", "team.key", "--cosign")
    assert "signs for every name, and --name is one" in run(*words, "--name", "x", code=2).stderr
    assert "4 files signed for every name by the p256 key" in run(*words).stdout
    assert "signed by cosign, for every name, by team.pub" in run("verify", "team/sql", "--key", "team.pub").stdout


OTHER_PAYLOADS = {
    "another type": {**GOOD, "critical": {**GOOD["critical"], "type": "atomic container signature"}},
    "a statement": {"_type": "https://in-toto.io/Statement/v1", "predicateType": TYPES[TESTS], "subject": [], "predicate": {}},
    "a statement as well": {**GOOD, "predicateType": TYPES[TESTS]},
    "another member": {**GOOD, "critical": {**GOOD["critical"], "other": 1}},
    "no image": {**GOOD, "critical": {**GOOD["critical"], "image": {}}},
    "another digest": {**GOOD, "critical": {**GOOD["critical"], "image": {"docker-manifest-digest": "sha512:" + "a" * 128}}},
    "no digest": {**GOOD, "critical": {**GOOD["critical"], "image": {"docker-manifest-digest": 1}}},
    "nothing": {"critical": None, "optional": None},
}


@pytest.mark.parametrize("form", OTHER_PAYLOADS)
def test_another_payload_is_refused_though_the_key_is_trusted(key: keys.PrivateKey, form: str) -> None:
    raw = signature(key, OTHER_PAYLOADS[form])
    with pytest.raises(AdapterhubError):
        bundle.find_accepted([raw], [key.public], FILES, "team/sql", "x", digest=DIGEST)
    with pytest.raises(AdapterhubError):
        attestation.verify(raw, [key.public], "x")


def test_an_attestation_without_the_name_of_its_key_is_verified_by_each(key: keys.PrivateKey) -> None:
    claim = Attestation(TYPES[TESTS], "team/sql", DIGEST, {"result": "PASSED"})
    raw = layer(ENVELOPE_TYPE).bundle(envelope(key, claim))
    assert attestation.find_accepted([raw], TESTS, [other_public_key(key), key.public], DIGEST, "x").attestation == claim
    with pytest.raises(IntegrityError, match="by a key that it does not name, which is not accepted"):
        attestation.find_accepted([raw], TESTS, [other_public_key(key)], DIGEST, "x")


def test_a_certificate_of_cosign_2_is_a_reason_and_never_ignored(key: keys.PrivateKey) -> None:
    raw = json.dumps(GOOD).encode()
    annotations = {cosign.SIGNATURE_ANNOTATION: base64.b64encode(key.sign(raw)).decode(), **CERTIFICATE}
    signed = layer(SIMPLE_SIGNING, **annotations).bundle(raw)
    with pytest.raises(FormatError, match="by an identity in the form of cosign 2, whose log entry has no proof"):
        bundle.find_accepted([signed], [key.public], FILES, "team/sql", "x", digest=DIGEST)
    attested = layer(ENVELOPE_TYPE, **CERTIFICATE).bundle(
        envelope(key, Attestation(TYPES[TESTS], "team/sql", DIGEST, {"result": "PASSED"}))
    )
    with pytest.raises(IntegrityError, match="is signed by an identity, and has not exactly one entry of a transparency log"):
        attestation.find_accepted([attested], TESTS, [key.public], DIGEST, "x")


def test_a_layer_of_another_type_is_a_reason(key: keys.PrivateKey) -> None:
    raw = layer("application/vnd.example+json").bundle(b"not even JSON")
    with pytest.raises(FormatError, match="a bundle of the type 'application/vnd.example"):
        bundle.find_accepted([raw], [key.public], FILES, "team/sql", "x", digest=DIGEST)


def test_a_signature_goes_back_into_the_layer_that_it_came_in(key: keys.PrivateKey) -> None:
    payload = json.dumps(GOOD, indent=3).encode()
    annotations = {cosign.SIGNATURE_ANNOTATION: base64.b64encode(key.sign(payload)).decode()}
    assert cosign.layer_of(layer(SIMPLE_SIGNING, **annotations).bundle(payload), "x") == (payload, annotations)
    assert cosign.layer_of(Attestation(TYPES[TESTS], "x", DIGEST, {}).sign(key), "x") is None
    with pytest.raises(FormatError, match="'payload' is not base64"):
        cosign.layer_of(json.dumps({"mediaType": SIMPLE_SIGNING, "payload": "%", "signature": ""}).encode(), "x")


@pytest.mark.parametrize(
    "entries",
    [None, {}, [None], [{}], [{"size": True, "digest": DIGEST}], [{"size": -1, "digest": DIGEST}],
     [{"size": 1, "digest": "x"}], [{"size": 1, "digest": DIGEST, "annotations": {"a": 1}}], [{}] * 1001],
)  # fmt: skip
def test_a_manifest_of_another_form_is_refused(entries: object) -> None:
    with pytest.raises(FormatError):
        list(cosign.layers(json.dumps({"layers": entries}).encode(), "x"))


def test_a_layer_that_could_not_be_a_signature_is_not_read() -> None:
    entries = [{"mediaType": SIMPLE_SIGNING, "digest": DIGEST, "size": size} for size in (7, bundle.MAX_BUNDLE + 1)]
    assert [layer.size for layer in cosign.layers(json.dumps({"layers": entries}).encode(), "x")] == [7]

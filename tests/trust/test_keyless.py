"""Signers by identity, as far as no package of Sigstore is needed: where they are named, and who they are not."""

from __future__ import annotations

import base64
import datetime
import json
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

import adapterhub as ah
from adapterhub.identity import MAX_LENGTH, Identity
from adapterhub.project import settings_file
from adapterhub.trust import bundle, keys
from adapterhub.trust.known_signers import KnownSigners
from adapterhub_converters.errors import FormatError, IntegrityError, MissingExtraError, ParameterError, UsageError
from tests.conftest import Run
from tests.support.adapters import Make

ADA = Identity("ada@example.com", "https://accounts.example.com")
EVE = Identity("eve@example.com", "https://accounts.example.com")
_ISSUER = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1")


def bundle_of(*names: x509.GeneralName, issuer: bytes | None = ADA.issuer.encode(), entries: int = 1) -> bytes:
    """A bundle with a certificate that its signer made, and entries of no log."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    subject = x509.Name([])
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).serial_number(1).public_key(key.public_key())
    builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(minutes=10))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
    if issuer is not None:
        builder = builder.add_extension(x509.UnrecognizedExtension(_ISSUER, issuer), critical=False)
    raw = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    material = {"certificate": {"rawBytes": base64.b64encode(raw).decode()}, "tlogEntries": [{}] * entries}
    envelope = {"payload": "e30=", "payloadType": bundle.PAYLOAD_TYPE, "signatures": [{"sig": "MA=="}]}
    return json.dumps({"mediaType": bundle.MEDIA_TYPE, "verificationMaterial": material, "dsseEnvelope": envelope}).encode()


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (bundle_of(x509.RFC822Name(EVE.name)), f"is signed by {EVE.title}, which is not accepted"),
        (
            bundle_of(x509.RFC822Name(ADA.name), issuer=b"https://evil.example"),
            f"is signed by {ADA.name} of https://evil.example, not of {ADA.issuer}, which is not accepted",
        ),
        (bundle_of(), "does not have one name"),
        (bundle_of(x509.RFC822Name(ADA.name), x509.RFC822Name(EVE.name)), "does not have one name"),
        (bundle_of(x509.DNSName("example.com")), "does not have one name"),
        (bundle_of(x509.RFC822Name(ADA.name), issuer=None), "does not have one name with its issuer"),
        (bundle_of(x509.RFC822Name(ADA.name), issuer=b"\xff"), "does not have one name with its issuer"),
        (bundle_of(x509.RFC822Name(ADA.name), issuer=b"a\nb"), "does not have one name with its issuer"),
        (bundle_of(x509.RFC822Name(ADA.name), entries=0), "has not exactly one entry of a transparency log"),
        (bundle_of(x509.RFC822Name(ADA.name), entries=2), "has not exactly one entry of a transparency log"),
    ],
)
def test_who_a_bundle_is_not_by_is_known_without_the_package(monkeypatch: pytest.MonkeyPatch, raw: bytes, words: str) -> None:
    monkeypatch.setitem(sys.modules, "sigstore", None)
    with pytest.raises((IntegrityError, FormatError), match=words.replace(".", r"\.")):
        bundle.verify(raw, [ADA], "x")


def test_what_may_be_by_an_identity_needs_the_package_and_the_error_has_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sigstore", None)
    with pytest.raises(MissingExtraError) as error:
        bundle.verify(bundle_of(x509.RFC822Name(ADA.name)), [ADA], "x")
    assert error.value.what == "signatures by an identity need sigstore, which is not installed"
    assert error.value.hint == "pip install 'adapterhub[sigstore]'"


def test_a_key_does_not_make_up_for_an_identity_nor_the_reverse(tmp_path: Path) -> None:
    _, public = keys.generate(tmp_path / "team")
    with pytest.raises(IntegrityError, match="is signed without a key, by ada@example.com .* and only keys are accepted"):
        bundle.verify(bundle_of(x509.RFC822Name(ADA.name)), [public], "x")


def test_an_identity_is_two_lines_of_bounded_length() -> None:
    for name, issuer in (("", "x"), ("x", ""), ("a\nb", "x"), ("x", "a" * (MAX_LENGTH + 1))):
        with pytest.raises(ParameterError, match="is not one line of at most 2048 characters") as caught:
            Identity(name, issuer)
        assert caught.value.hint == "Write it as the certificates of the signer have it"


def test_known_signers_keep_identities_whatever_is_in_them(tmp_path: Path) -> None:
    known_signers, odd = KnownSigners(tmp_path / "known"), Identity("a b/%20@x", "https://x/ y", tmp_path / "a b.json")
    _, public = keys.generate(tmp_path / "team")
    assert [known_signers.keep("team", signer) for signer in (ADA, odd, public, ADA)] == [True, True, True, False]
    assert [signer.id for signer in known_signers.signers_of("team")] == [ADA.id, odd.id, public.id]
    assert known_signers.signers_of("team")[1] == odd
    for line in ("team sigstore a\n", "team sigstore a b c d\n", "team sigstore  b\n"):
        known_signers.path.write_text(line)
        with pytest.raises(UsageError, match="is not a namespace, a kind and a key"):
            known_signers.signers_of("team")


def test_a_policy_names_identities_next_to_keys(tmp_path: Path) -> None:
    text = '[policy.signers]\n"team/*" = ["k.pub", {{ identity = "{0}", issuer = "{1}", trust_config = "t.json" }}]\n'
    policy = settings_file.parse(text.format(ADA.name, ADA.issuer), tmp_path / "adapterhub.toml").policy
    (rule,) = policy.signing_rules("team/sql")
    assert rule.keys == (tmp_path / "k.pub", Identity(ADA.name, ADA.issuer, tmp_path / "t.json"))


@pytest.mark.parametrize(
    "value",
    ['{ identity = "a" }', '{ issuer = "a" }', '{ identity = "a", issuer = 1 }', '{ identity = "a", issuer = "" }',
     '{ identity = "a", issuer = "b", name = "c" }', "3", '""'],
)  # fmt: skip
def test_an_identity_of_a_policy_that_is_none_is_an_error_with_its_line(tmp_path: Path, value: str) -> None:
    with pytest.raises(UsageError, match=r"toml:2: 'policy.signers.\*' is not a list of at most 256 paths of keys, and ident"):
        settings_file.parse(f'[policy.signers]\n"*" = ["k.pub", {value}]\n', tmp_path / "adapterhub.toml")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("sign", "sql"), "--key or --keyless: one of them is required"),
        (("sign", "sql", "--key", "k", "--keyless"), "--key or --keyless: one of them is required"),
        (("sign", "sql", "--key", "k", "--identity-token", "-"), "require --keyless"),
        (("verify", "sql", "--identity", "a"), "--identity and --issuer: require each other"),
        (("verify", "sql", "--trust-config", "t"), "--trust-config: requires --identity"),
    ],
)
def test_options_that_belong_together_are_asked_for(run: Run, words: tuple[str, ...], error: str) -> None:
    assert error in run(*words, code=2).stderr


def test_python_names_an_identity_as_it_names_keys(make: Make) -> None:
    (finding,) = ah.verify(make("sql"), keys=ADA).findings
    assert finding.what == "is not signed"

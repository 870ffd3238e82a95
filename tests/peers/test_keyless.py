"""Keyless signatures: Sigstore's own stand-in certifies and records them, and OpenSSF's program verifies and makes them too."""

from __future__ import annotations

import base64
import json
import random
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import adapterhub as ah
from adapterhub.trust import bundle, keyless, keys
from adapterhub.trust.statement import Statement
from adapterhub_converters.errors import AdapterhubError
from tests.conftest import Run
from tests.registry.test_packaging import write_base
from tests.support import sigstore
from tests.support.adapters import Make
from tests.support.sigstore import ADA, ISSUER, Sigstore

pytestmark = pytest.mark.peer
FILES = {"a.txt": "sha256:" + "a" * 64}


@pytest.fixture(scope="module")
def programs() -> Iterator[Path]:
    with sigstore.installed() as folder:
        yield folder


@pytest.fixture(scope="module")
def private(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sigstore]:
    with sigstore.running(tmp_path_factory.mktemp("sigstore")) as server:
        yield server


@pytest.fixture(scope="module")
def good(private: Sigstore) -> bytes:
    """A bundle."""
    return bundle.sign(Statement("sql", FILES), keyless.KeylessSigner(private.token(), private.config))


@pytest.fixture(name="run")
def run_with_sigstore(run: Run, programs: Path) -> Run:
    """As `run`, in a process that has the package."""
    return partial(run, first=sigstore.first())


@pytest.fixture
def token(private: Sigstore, tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(private.token())
    return path


@pytest.fixture
def signing(private: Sigstore, token: Path) -> tuple[object, ...]:
    return ("--keyless", "--identity-token", token, "--trust-config", private.config)


@pytest.fixture
def accepting(private: Sigstore) -> tuple[object, ...]:
    return ("--identity", ADA, "--issuer", ISSUER, "--trust-config", private.config)


def model_signing(programs: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [str(word) for word in (programs / "model_signing", *words)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_model_signing_verifies_what_is_signed_here_and_the_reverse(
    run: Run, make: Make, private: Sigstore, programs: Path, signing: tuple[object, ...], accepting: tuple[object, ...]
) -> None:
    folder = make("sql")
    theirs = ("--identity", ADA, "--identity_provider", ISSUER, "--trust_config", private.config, folder)
    assert f"signed as sql by {ADA} of {ISSUER}" in run("sign", folder, *signing).stdout
    result = model_signing(programs, "verify", "sigstore", "--signature", folder / "model.sig", *theirs)
    assert result.returncode == 0, result.stderr
    assert f"signed as sql by {ADA} of {ISSUER}" in run("verify", folder, *accepting).stdout

    (folder / "model.sig").unlink()
    words = ("--identity_token", private.token(), "--trust_config", private.config, "--signature", folder / "model.sig", folder)
    result = model_signing(programs, "sign", "sigstore", *words)
    assert result.returncode == 0, result.stderr
    run("verify", folder, *accepting)
    run("verify", folder, *accepting[:-1], private.root)  # the trusted root alone
    (folder / "README.md").write_text("another")
    assert "README.md (changed)" in run("verify", folder, *accepting, code=1).stdout
    assert model_signing(programs, "verify", "sigstore", "--signature", folder / "model.sig", *theirs).returncode != 0


@pytest.mark.parametrize(
    ("identity", "issuer", "words"),
    [
        ("https://example.com/eve", ISSUER, f"is signed by {ADA} of {ISSUER}, which is not accepted"),
        (ADA, "https://evil.example", f"is signed by {ADA} of {ISSUER}, not of https://evil.example, which is not accepted"),
    ],
)
def test_another_identity_or_issuer_is_refused_by_name(
    run: Run, make: Make, private: Sigstore, signing: tuple[object, ...], identity: str, issuer: str, words: str
) -> None:
    folder = make("sql")
    run("sign", folder, *signing)
    trust = ("--trust-config", private.config)
    assert words in run("verify", folder, "--identity", identity, "--issuer", issuer, *trust, code=1).stdout


def test_a_certificate_that_had_expired_when_the_log_recorded_it_is_refused(
    run: Run, make: Make, private: Sigstore, token: Path, accepting: tuple[object, ...], programs: Path
) -> None:
    folder = make("sql")
    words = ("--identity_token", token.read_text(), "--trust_config", private.late, "--signature", folder / "model.sig", folder)
    assert model_signing(programs, "sign", "sigstore", *words).returncode == 0  # it signs without looking
    assert "was not valid when the log recorded it" in run("verify", folder, *accepting, code=1).stdout
    (folder / "model.sig").unlink()
    result = run("sign", folder, "--keyless", "--identity-token", token, "--trust-config", private.late, code=4)
    assert "was not valid when the log recorded it" in result.stderr
    assert not (folder / "model.sig").exists()


def stripped(document: Any) -> None:
    document["verificationMaterial"]["tlogEntries"] = []


def without_proof(document: Any) -> None:
    del document["verificationMaterial"]["tlogEntries"][0]["inclusionProof"]


def without_promise(document: Any) -> None:
    del document["verificationMaterial"]["tlogEntries"][0]["inclusionPromise"]


def of_another_entry(document: Any) -> None:
    entry = document["verificationMaterial"]["tlogEntries"][0]
    body = json.loads(base64.b64decode(entry["canonicalizedBody"]))
    body["spec"]["payloadHash"]["value"] = "0" * 64
    entry["canonicalizedBody"] = base64.b64encode(json.dumps(body).encode()).decode()


def earlier(document: Any) -> None:
    entry = document["verificationMaterial"]["tlogEntries"][0]
    entry["integratedTime"] = str(int(entry["integratedTime"]) + 1)


def other_payload(document: Any) -> None:
    payload = base64.b64decode(document["dsseEnvelope"]["payload"]).replace(b"a.txt", b"b.txt")
    document["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()


def with_a_key(document: Any) -> None:
    document["verificationMaterial"]["publicKey"] = {"hint": "a" * 64}


FORGED: dict[Callable[[Any], None], str] = {
    stripped: "has not exactly one entry of a transparency log",
    without_proof: "inclusionProof",
    without_promise: "inclusion promise",
    of_another_entry: "invalid log entry",
    earlier: "invalid log entry",
    other_payload: "DSSE: invalid signature",
    with_a_key: "'publicKey' has no place in a bundle",
}


@pytest.mark.parametrize("forge", FORGED, ids=lambda forge: forge.__name__)
def test_a_bundle_that_was_changed_is_refused_by_name(private: Sigstore, good: bytes, forge: Callable[[Any], None]) -> None:
    document = json.loads(good)
    forge(document)
    with pytest.raises(AdapterhubError, match=FORGED[forge]):
        bundle.verify(json.dumps(document).encode(), [ah.Identity(ADA, ISSUER, private.config)], "x")


def test_a_policy_requires_an_identity_under_the_name_of_the_version(
    run: Run, make: Make, private: Sigstore, signing: tuple[object, ...], tmp_path: Path
) -> None:
    signer = f'{{ identity = "{ADA}", issuer = "{ISSUER}", trust_config = "{private.config}" }}'
    run("push", make("sql"), "team/sql")
    run("sign", "team/sql", *signing)
    run("push", make("other", seed=2), "team/other")
    run("sign", "team/other", "--name", "team/sql", *signing)
    (tmp_path / "adapterhub.toml").write_text(f'[policy.signers]\n"team/*" = [{signer}]\n')
    run("pull", "team/sql", "-o", "out", "--require-signature", "--remember")
    assert "the signature is for 'team/sql', not for 'team/other'" in run("pull", "team/other", "-o", "x", code=6).stderr
    run("push", make("more", seed=3), "team/more", code=6)

    (tmp_path / "adapterhub.toml").unlink()  # known for the namespace from now on
    run("pull", "team/sql", "-o", "again")
    assert f"is known to be signed by {ADA} of {ISSUER}" in run("pull", "team/other", "-o", "x", code=6).stderr


def test_an_identity_attests_and_signs_checkpoints(
    run: Run, make: Make, signing: tuple[object, ...], accepting: tuple[object, ...], tmp_path: Path
) -> None:
    write_base(tmp_path / "base")
    run("push", make("sql"), "team/sql")
    assert f"fits attested by {ADA}" in run("attest", "team/sql", "--fits", "base", *signing).stdout
    document = json.loads(run("verify", "team/sql", "--attestations", *accepting, "--json").stdout)
    assert document["attestations"][0]["signer"]["identity"] == ADA
    run("audit", "checkpoint", "-o", "ends.json", *signing)
    assert f"signed by {ADA}" in run("audit", "verify", "--checkpoint", "ends.json", *accepting).stdout


def test_an_identity_signs_results_that_are_imported(
    run: Run, make: Make, signing: tuple[object, ...], accepting: tuple[object, ...], tmp_path: Path
) -> None:
    run("push", make("sql"), "team/sql")
    (tmp_path / "results.xml").write_text('<testsuite name="golden"><testcase name="a"/><testcase name="b"/></testsuite>')
    run("eval", "team/sql", "--import", "results.xml", "--trust-name", *signing)
    [attested] = json.loads(run("verify", "team/sql", "--attestations", *accepting, "--json").stdout)["attestations"]
    assert (attested["kind"], attested["signer"]["identity"]) == ("tests", ADA)


def test_what_has_both_kinds_of_signers_takes_either(private: Sigstore, good: bytes, tmp_path: Path) -> None:
    pair, public = keys.generate(tmp_path / "team")
    trusted = keys.read_trusted([public.source, ah.Identity(ADA, ISSUER, private.config)])
    by_key = bundle.sign(Statement("sql", FILES), keys.read_private(pair))
    for raw in (by_key, good):
        assert bundle.find_accepted([raw], trusted, FILES, "team/sql", "x").statement.name == "sql"
    with pytest.raises(AdapterhubError, match="is signed without a key, by .* and only keys are accepted"):
        bundle.find_accepted([good], trusted[:1], FILES, "sql", "x")
    with pytest.raises(AdapterhubError, match="is signed by the key .* which is not accepted"):
        bundle.find_accepted([by_key], trusted[1:], FILES, "sql", "x")


def test_tokens_that_are_none_have_expired_or_are_refused_are_errors_of_one_line(
    run: Run, make: Make, private: Sigstore, tmp_path: Path
) -> None:
    folder, path = make("sql"), tmp_path / "token"
    for text, words, code in (
        ("", "is missing", 2),
        ("nonsense", "is not one that Sigstore takes", 2),
        (private.token(seconds=-60), "is not one that Sigstore takes", 2),
    ):
        path.write_text(text)
        result = run("sign", folder, "--keyless", "--identity-token", path, "--trust-config", private.config, code=code)
        assert words in result.stderr
        assert not text or "Get a new one, for the audience sigstore" in result.stderr
        assert not text or text not in result.stderr
    path.write_text(private.token())
    hint = "Pass a client trust config or, to verify, a trusted root, in the JSON of Sigstore"
    for text, words in (("{}", "mediaType: Field required"), ("[]", "Input should be an object"), ("x", "Invalid JSON: .*")):
        (tmp_path / "odd.json").write_text(text)
        result = run("sign", folder, "--keyless", "--identity-token", path, "--trust-config", "odd.json", code=4)
        assert re.fullmatch(rf"error: odd.json: not a trust config: {words}. {hint}  \[malformed\]\n", result.stderr)
    (tmp_path / "gone.json").write_text(private.config.read_text().replace("127.0.0.1:", "127.0.0.1:1"))
    result = run("sign", folder, "--keyless", "--identity-token", path, "--trust-config", "gone.json", code=5)
    assert path.read_text() not in result.stderr


@pytest.mark.parametrize("seed", range(4))
def test_no_mutation_of_a_bundle_is_accepted_or_a_traceback(private: Sigstore, good: bytes, seed: int) -> None:
    trusted = [ah.Identity(ADA, ISSUER, private.config)]
    expected, dice = bundle.verify(good, trusted, "x").statement, random.Random(seed)
    for _ in range(60):
        document = json.loads(good)
        for _ in range(dice.randint(1, 2)):
            mutate(document, dice)
        with suppress(AdapterhubError):
            assert bundle.verify(json.dumps(document).encode(), trusted, "x").statement == expected


def mutate(document: Any, dice: random.Random) -> None:
    """Change one value somewhere: its kind, its length, or a byte of what it encodes."""
    while isinstance(document, dict | list) and document:
        key = dice.choice(list(document) if isinstance(document, dict) else range(len(document)))
        value = document[key]
        if not isinstance(value, dict | list) or not value or dice.random() < 0.1:
            document[key] = changed(value, dice)
            return
        document = value


def changed(value: Any, dice: random.Random) -> Any:
    if isinstance(value, str) and len(value) > 20 and dice.random() < 0.8:
        with suppress(ValueError):
            raw = bytearray(base64.b64decode(value, validate=True))
            raw[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
            return base64.b64encode(raw).decode()
    return dice.choice([None, "", 0, -1, 2**70, "9" * 400, [], {}, "MA==", True, [value], {"a": value}])

"""The official program `model_signing`, in an environment of its own, and bundles whose payloads a test chooses."""

from __future__ import annotations

import atexit
import base64
import functools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapterhub.trust.keys import PrivateKey
from tests.support.environments import environment

_CODE = """
import json, sys, traceback
import model_signing

def act(verb, key, folder, signature, *password):
    hashing = model_signing.hashing.Config().set_ignored_paths(paths=[signature], ignore_git_paths=True)
    if verb == "sign":
        secret = password[0].encode() if password else None  # its own program passes text, which cryptography refuses
        config = model_signing.signing.Config().use_elliptic_key_signer(private_key=key, password=secret)
        config.set_hashing_config(hashing).sign(folder, signature)
    elif verb == "verify":  # as a caller that knows nothing of how it was signed
        model_signing.verifying.Config().use_elliptic_key_verifier(public_key=key).verify(folder, signature)

answers, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    error = ""
    try:
        act(*json.loads(line))
    except Exception as raised:
        error = "".join(traceback.format_exception_only(raised)).strip().splitlines()[-1]
    print(json.dumps(error), file=answers, flush=True)
"""


@functools.cache
def _running() -> subprocess.Popen[str]:
    """A process that has imported the program, which takes it seconds; it acts on lines of its stdin until that is closed."""
    python = environment("model-signing==1.1.1", "pyOpenSSL==26.4.0")  # which it imports, and does not require
    process = subprocess.Popen(
        [python, "-c", _CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    atexit.register(process.communicate)
    return process


def model_signing(verb: str, key: Path, folder: Path, *password: str) -> str:
    """Sign or verify a folder by its model.sig as others do; return the last line of the error, empty for success."""
    process = _running()
    assert process.stdin
    assert process.stdout
    print(json.dumps([verb, str(key), str(folder), str(folder / "model.sig"), *password]), file=process.stdin, flush=True)
    return str(json.loads(process.stdout.readline()))


def payload_of(signature: Path) -> Any:
    """The statement in a signature."""
    return json.loads(base64.b64decode(json.loads(signature.read_bytes())["dsseEnvelope"]["payload"]))


def resign(signature: Path, key: PrivateKey, change: Callable[[Any], object]) -> None:
    """Have a key sign a statement that was changed, as a signer who is trusted for something else may."""
    statement = payload_of(signature)
    change(statement)
    payload, kind = json.dumps(statement).encode(), b"application/vnd.in-toto+json"
    message = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    bundle = json.loads(signature.read_bytes())
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    bundle["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(key.sign(message)).decode()
    bundle["verificationMaterial"]["publicKey"]["hint"] = key.public.id
    signature.write_text(json.dumps(bundle))

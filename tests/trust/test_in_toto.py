"""What is attested here is read by in-toto's own bindings, and its envelope is verified by securesystemslib."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path

import pytest

from adapterhub.trust import keys
from adapterhub.trust.attestation import TYPES, Attestation
from tests.support.environments import environment

pytestmark = pytest.mark.peer
DIGEST = "sha256:" + "a" * 64
PROVENANCE = {
    "buildDefinition": {
        "buildType": "urn:adapterhub:build:train:1",
        "externalParameters": {"config": {"train": {"steps": 3}}},
        "internalParameters": {"seed": 7},
        "resolvedDependencies": [
            {
                "name": "org/base",
                "annotations": {"role": "base", "fingerprint": DIGEST, "revision": None, "quantization": None},
            },
            {"name": "train.jsonl", "digest": {"sha256": "b" * 64}, "annotations": {"role": "data", "documents": 1}},
        ],
    },
    "runDetails": {
        "builder": {"id": "urn:adapterhub:trainer", "version": {"torch": "2.8.0"}},
        "metadata": {"finishedOn": "2026-01-31T12:00:00Z"},
    },
}
_CODE = """
import json, sys
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from google.protobuf.json_format import ParseDict
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import SSlibKey

def read(bundle, pem):
    document = json.loads(bundle)
    envelope = document["dsseEnvelope"]
    hint = document["verificationMaterial"]["publicKey"]["hint"]
    key = SSlibKey.from_crypto(load_pem_public_key(pem), keyid=hint)
    envelope["signatures"][0]["keyid"] = hint  # which a bundle has in its verification material
    parsed = Envelope.from_dict(envelope)
    try:
        parsed.verify([key], 1)
    except VerificationError:
        return "VerificationError"
    statement = json.loads(parsed.payload)
    read = Statement.copy_from_pb(ParseDict(statement, statement_pb2.Statement()))
    read.validate()
    if statement["predicateType"] == "https://slsa.dev/provenance/v1":
        ParseDict(statement["predicate"], provenance_pb2.Provenance())
    return f'{read.pb.predicate_type} {read.pb.subject[0].name} {read.pb.subject[0].digest["sha256"]}'

for pair in zip(sys.argv[1::2], sys.argv[2::2]):
    print(read(*(open(path, "rb").read() for path in pair)))
"""


def test_in_toto_reads_what_is_attested_here_by_a_key_of_any_kind(tmp_path: Path) -> None:
    python = environment("in-toto-attestation==0.9.3", "securesystemslib[crypto]==1.6.0")
    words, expected = [], []
    for kind in keys.KINDS:
        secret, public = keys.generate(tmp_path / kind, kind)
        for number, type_ in enumerate(TYPES.values()):
            raw = Attestation(type_, "team/sql", DIGEST, PROVENANCE).sign(keys.read_private(secret))
            document = json.loads(raw)
            payload = base64.b64decode(document["dsseEnvelope"]["payload"]).replace(b"team/sql", b"team/SQL")
            document["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
            for name, bundle in (("right", raw), ("wrong", json.dumps(document).encode())):
                path = tmp_path / f"{kind}-{number}-{name}"
                path.write_bytes(bundle)
                words += [path, public.source]
            expected += [f"{type_} team/sql {'a' * 64}", "VerificationError"]
    result = subprocess.run([str(word) for word in (python, "-c", _CODE, *words)], check=False, capture_output=True, text=True)
    assert result.stdout.splitlines() == expected, result.stderr

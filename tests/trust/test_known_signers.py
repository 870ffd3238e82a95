"""A signer is known for a place, by whatever protocol an address names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub.trust import keys
from adapterhub.trust.known_signers import KnownSigners


@pytest.mark.parametrize(
    ("remembered", "place", "is_known"),
    [
        ("oci+http://hub.example:5000/team", "hub+http://hub.example:5000/team", True),
        ("oci://hub.example/team", "hub+https://HUB.example:443/team", True),
        ("hf://team", "hub+https://huggingface.co/team", True),
        ("hf://team", "hf://team", True),
        ("team", "team", True),
        ("s3://bucket/team", "s3://bucket/team", True),
        ("oci://hub.example/team", "oci://hub.example/other", False),
        ("oci://hub.example/team", "oci://hub.example:8443/team", False),
        ("oci://hub.example/team", "oci://hub.example/Team", False),
        ("s3://bucket/team", "gs://bucket/team", False),
        ("s3://bucket/team", "oci://bucket/team", False),
        ("team", "hf://team", False),
    ],
)
def test_a_signer_is_known_for_a_place(remembered: str, place: str, is_known: bool, tmp_path: Path) -> None:
    keys.generate(tmp_path / "key", keys.ED25519)
    signer = keys.read_public(tmp_path / "key.pub")
    known_signers = KnownSigners(tmp_path / "known_signers")
    known_signers.keep(remembered, signer)
    assert [known_signer.pem for known_signer in known_signers.signers_of(place)] == ([signer.pem] if is_known else [])

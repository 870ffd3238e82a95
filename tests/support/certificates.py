"""Certificates for tests, signed by themselves."""

from __future__ import annotations

import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat


def write_certificate(path: Path, *, days: float, secret: Path | None = None) -> Path:
    """Write a certificate that ends in some days, or ended some days ago; and its private key, if `secret` is given."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "hub.example")])
    certificate_builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    certificate_builder = certificate_builder.not_valid_before(now - datetime.timedelta(days=100)).not_valid_after(
        now + datetime.timedelta(days=days)
    )
    path.write_bytes(certificate_builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    if secret:
        secret.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return path

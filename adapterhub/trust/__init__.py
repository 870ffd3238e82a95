"""Signatures of adapters that anyone can verify: keys, the signed statement, and the bundle that carries it.

The format is that of OpenSSF model signing 1.0 (sigstore/model-transparency), so that its program `model_signing` verifies what
is signed here, and the reverse. Keys need `cryptography` and nothing else.
"""

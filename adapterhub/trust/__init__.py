"""Signatures of adapters that anybody can check: keys, what is signed, and the bundle that carries it.

The format is that of OpenSSF model signing 1.0 (sigstore/model-transparency), so that its program `model_signing` verifies what
is signed here, and the reverse. Keys need `cryptography`; nothing else is needed.
"""

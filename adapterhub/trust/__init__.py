"""Signatures of adapters that anyone can verify: keys, the signed statement, and the bundle that carries it.

    keys            keys in PEM; `signers`, keys in files or hardware; `keyless`, identities
    statement       what is signed: the digests of the files; `bundle`, what carries it; `cosign`, the bundle of cosign 2
    attestation     statements about how a version came to be
    release_claims  approvals and withdrawals, signed
    log_checkpoint  the ends of all logs, signed
    known_signers   signers that a user has accepted
    cyclonedx_bom   the bill of materials in CycloneDX; `spdx_bom`, in SPDX

The format is that of OpenSSF model signing 1.0 (sigstore/model-transparency), so that its program `model_signing` verifies what
is signed here, and the reverse. Keys need `cryptography` and nothing else.
"""

"""`adapterhub key`: keys to sign with."""

from __future__ import annotations

from pathlib import Path

import click

from adapterhub.cli import output, signing_options
from adapterhub.cli.options import Choice, Group, Settings

_KINDS = (
    "p256",
    "p384",
    "p521",
    "ed25519",
)  # those of adapterhub.trust.keys, which needs cryptography: help must not import it


@click.group(
    "key",
    cls=Group,
    example="""
    adapterhub key generate ./team
    adapterhub sign ./sql --key team.key""",
)
def key() -> None:
    """Generate keys to sign adapters with.

    A private key signs; the public key that belongs to it, which is no secret, verifies the signature.
    """


@key.command(
    "generate",
    short_help="Write a new pair of keys.",
    example="""
    adapterhub key generate ./team
    adapterhub key generate ./ci --curve p384 --passphrase""",
)
@click.argument("path", metavar="PATH", type=click.Path(path_type=Path))
@click.option("--curve", "kind", type=Choice(_KINDS), default="p256", show_default=True, help="Kind of key.")
@signing_options.new_passphrase_options
@click.pass_obj
def generate(settings: Settings, *, path: Path, kind: str, passphrase: signing_options.Passphrase) -> None:
    """Write a new pair of keys: PATH.key, which only you can read, and PATH.pub, to give to others.

    OpenSSF model signing has the kinds p256, p384 and p521 (ECDSA) too, so its program `model_signing` verifies their
    signatures. It cannot verify signatures by ed25519; adapterhub can.
    """
    from adapterhub.trust import keys

    secret, public = keys.generate(path, kind, passphrase.new())
    if public.kind == keys.ED25519:
        output.say("model_signing cannot verify signatures by this kind of key; adapterhub can")
    document = {"private": str(secret), "public": public.source, "type": public.kind, "id": public.id}
    text = f"{secret}, {public.source}: {public.kind} key {public.id[:16]}…"
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(output.one_line(text)))

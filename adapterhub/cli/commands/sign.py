"""`adapterhub sign`."""

from __future__ import annotations

import click

from adapterhub.cli import output, signing_options
from adapterhub.cli.options import Settings, command
from adapterhub.cli.registry_choice import workspace
from adapterhub.manifest.package_files import SIGNATURE


@command(
    "sign",
    example="""
    adapterhub sign ./sql --key team.key
    adapterhub sign team/sql:v2 --key team.key
    adapterhub sign oci://registry.example/team/sql:v2 --key team.key
    adapterhub sign team/sql:v2 --keyless""",
)
@click.argument("source", metavar="SRC")
@signing_options.required_signer
@click.option(
    "--name",
    metavar="NAME",
    help="Name of the adapter that is signed. [default: the name of the ref, the address or the folder]",
)
@click.pass_obj
def sign(settings: Settings, *, source: str, signer: signing_options.SignerOption, name: str | None) -> None:
    """Sign an adapter: its name and the digest of each of its files, as OpenSSF model signing does.

    The signature is written to model.sig in a folder, stored in the registry for a version in it, and attached to a version in
    an OCI registry or an image layout. The version and its digest do not change.

    With --keyless, Sigstore certifies who you are for ten minutes, by an identity token, and records the signature in its log:
    with the public Sigstore, your identity and the digest of what you sign are public, for good.
    """
    from adapterhub.operations.sign import sign as signed

    signature = signed(source, signer.read(), name=name, workspace=workspace(settings))
    document = {
        "ref": signature.ref,
        "name": signature.name,
        "digest": signature.digest,
        "files": list(signature.files),
        **signature.signer.document(),
    }
    file_count = output.plural(len(signature.files), "file")
    # Only a version has a digest; the signature of a folder is a file in it.
    label = signature.ref if signature.digest else f"{signature.ref}/{SIGNATURE}"
    text = f"{label}: {file_count} signed as {signature.name} by {signature.signer.title}"
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(output.one_line(text)))

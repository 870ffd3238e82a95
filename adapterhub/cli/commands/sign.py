"""`adapterhub sign`."""

from __future__ import annotations

import click

from adapterhub.cli import output, signing_options
from adapterhub.cli.options import Settings, command
from adapterhub.cli.registry_choice import workspace
from adapterhub.cli.remote_choice import remote_option, source_at_remote
from adapterhub.manifest.package_files import SIGNATURE
from adapterhub_converters.errors import UsageError


@command(
    "sign",
    example="""
    adapterhub sign ./sql --key team.key
    adapterhub sign team/sql:v2 --key team.key
    adapterhub sign team/sql:v2 --key team.key --remote
    adapterhub sign oci://registry.example/team/sql:v2 --key team.key
    adapterhub sign oci://registry.example/team/sql:v2 --key team.key --cosign
    adapterhub sign team/sql:v2 --keyless""",
)
@click.argument("source", metavar="SRC")
@signing_options.required_signer
@click.option(
    "--name",
    metavar="NAME",
    help="Name of the adapter that is signed. [default: the name of the ref, the address or the folder]",
)
@click.option("--cosign", is_flag=True, help="Sign the version for every name, as cosign does, whose `verify` finds it.")
@remote_option
@click.pass_obj
def sign(
    settings: Settings, *, source: str, signer: signing_options.SignerOption, name: str | None, cosign: bool, remote: str | None
) -> None:
    """Sign an adapter: its name and the digest of each of its files, as OpenSSF model signing does.

    The signature is written to model.sig in a folder, stored in the registry for a version in it, and attached to a version in
    an OCI registry or an image layout. The version and its digest do not change.

    With --keyless, Sigstore certifies who you are for ten minutes, by an identity token, and records the signature in its log:
    with the public Sigstore, your identity and the digest of what you sign are public, for good.
    """
    from adapterhub.operations import sign as signing

    if cosign and name:
        raise UsageError("--cosign", "signs for every name, and --name is one", "Leave one out", code="conflicting-options")
    source = source_at_remote(source, remote)
    if cosign:
        signature = signing.sign_for_cosign(source, signer.read(), workspace=workspace(settings))
    else:
        signature = signing.sign(source, signer.read(), name=name, workspace=workspace(settings))
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
    names = f"as {signature.name}" if signature.name else "for every name"
    text = f"{label}: {file_count} signed {names} by {signature.signer.title}"
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(output.one_line(text)))

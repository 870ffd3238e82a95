"""`adapterhub attest`."""

from __future__ import annotations

from pathlib import Path

import click

from adapterhub.cli import output, signing_options
from adapterhub.cli.options import Settings, command
from adapterhub.cli.registry_choice import workspace


@command(
    "attest",
    example="""
    adapterhub attest team/sql:v2 --fits ./Qwen3-0.6B --training --key team.key
    adapterhub attest team/both:v1 --merge --parent-key team.pub --key ci.key
    adapterhub attest team/sql:v2 --scan --bill --base-license apache-2.0 --key ci.key
    adapterhub verify team/sql:v2 --attestations --recompute --base ./Qwen3-0.6B --key team.pub""",
)
@click.argument("ref")
@signing_options.required_signer
@click.option("--fits", metavar="BASE", help="Attest that it fits this base model, with the verdict of each runtime.")
@click.option(
    "--merge", is_flag=True, help="Attest that a rebuild from its parents, each of them signed, gives the same bytes."
)
@click.option(
    "--training", is_flag=True, help="Attest its config, data and base, as adapter.json records them: SLSA provenance."
)
@click.option("--scan", is_flag=True, help="Attest that a scan of its files finds no error.")
@click.option("--bill", is_flag=True, help="Attest its bill of materials: CycloneDX.")
@signing_options.parent_keys
@click.option(
    "--builder",
    metavar="URI",
    help="What trained it, in the provenance of a training; required unless adapterhub's own trainer did.",
)
@click.option("--base-license", metavar="SPDX", help="License of the base, instead of the one in its model card.")
@click.pass_obj
def attest(
    settings: Settings,
    *,
    ref: str,
    signer: signing_options.SignerOption,
    fits: str | None,
    merge: bool,
    training: bool,
    scan: bool,
    bill: bool,
    parents: tuple[Path, ...],
    builder: str | None,
    base_license: str | None,
) -> None:
    """Sign in-toto statements about a version that anyone with the inputs can recompute.

    Each statement is computed first; one that does not hold is refused (exit 6). Statements are stored and attached as
    signatures are, and a policy can require them. They are about the bytes of the version, whatever its name is.
    """
    from adapterhub.operations import attest as attest_operation

    statements = attest_operation.attest(
        ref,
        signer.read(),
        fits=fits,
        merge=merge,
        training=training,
        scan=scan,
        bill=bill,
        parents=parents,
        builder=builder,
        base_license=base_license,
        workspace=workspace(settings),
    )
    document = {
        "ref": ref,
        "digest": statements[0].attestation.digest,
        "attestations": [signing_options.attestation_document(statement) for statement in statements],
    }

    def text() -> None:
        for statement in statements:
            output.write(output.one_line(f"{ref}: {statement.kind} attested by {statement.signer.title}"))

    output.emit(document, as_json=settings.as_json, text=text)

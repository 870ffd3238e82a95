"""`adapterhub verify`."""

from __future__ import annotations

from pathlib import Path

import click

from adapterhub.cli import signing_options
from adapterhub.cli.options import Settings, base_option, command
from adapterhub.cli.registry_choice import workspace
from adapterhub.cli.remote_choice import remote_option, source_at_remote
from adapterhub.cli.views import finding_report as view
from adapterhub.identity import Identity
from adapterhub_converters.errors import UsageError


@command(
    "verify",
    example="""
    adapterhub verify team/sql:v2
    adapterhub verify ./sql
    adapterhub verify team/sql:v2 --key team.pub
    adapterhub verify team/sql:v2 --identity release@example.com --issuer https://accounts.example.com
    adapterhub verify team/sql:v2 --attestations --recompute --base ./Qwen3-0.6B --key team.pub""",
)
@click.argument("source", metavar="SRC")
@signing_options.accepted_signers
@signing_options.signed_as
@click.option("--attestations", is_flag=True, help="Verify what the keys attest about a version, rather than a signature.")
@click.option("--recompute", is_flag=True, help="Compute attestations again from their inputs, and compare.")
@base_option("that it is attested to fit, or was trained on.")
@click.option(
    "--data",
    metavar="FILE",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Data: a file that it was trained on; repeatable.",
)
@signing_options.parent_keys
@remote_option
@click.pass_obj
def verify(
    settings: Settings,
    source: str,
    *,
    keys: tuple[Path | Identity, ...],
    signed_as: str | None,
    attestations: bool,
    recompute: bool,
    base: str | None,
    data: tuple[Path, ...],
    parents: tuple[Path, ...],
    remote: str | None,
) -> int:
    """Compare bytes with digests: a folder with its adapter.json, a version here or at an address with its manifest.

    With --key, the digests must have been signed by that key, with --identity by somebody whom Sigstore certifies as that: in
    model.sig of a folder, or in a signature of the version. The signature must be for the name of the version, and for all of
    its files and no others.

    With --attestations, the key must have attested something about the version; with --recompute, that must be the same when it
    is computed again: of a training its inputs are compared, and `adapterhub rebuild` repeats it.

    Exits 0 when every byte matches, else 1.
    """
    from adapterhub.operations.attest_predicates import Inputs
    from adapterhub.operations.sign import verify as verified
    from adapterhub.trust.attestation import TESTS, TRAINING

    if signed_as and attestations:
        raise UsageError("--signed-as", "is not for --attestations", "Leave it out", code="conflicting-options")
    if signed_as and not keys:
        problem = "requires --key or --identity"
        raise UsageError("--signed-as", problem, "Pass the signer's too", code="conflicting-options")
    if recompute and not attestations:
        raise UsageError("--recompute", "requires --attestations", "Pass --attestations too", code="conflicting-options")
    if (base or data or parents) and not recompute:
        raise UsageError(
            "--base, --data and --parent-key", "require --recompute", "Pass --recompute too", code="conflicting-options"
        )
    source = source_at_remote(source, remote)
    inputs = Inputs(base, parents, data) if recompute else None
    result = verified(
        source, keys=keys, name=signed_as, attestations=attestations, recompute=inputs, workspace=workspace(settings)
    )
    success_text = "every byte matches"
    if (signature := result.signature) is not None:
        name = f"as {signature.name}" if signature.name else "by cosign, for every name,"
        success_text += f", signed {name} by {signing_options.signer_line(signature.signer)}"
    for statement in result.attestations:
        success_text += f", {statement.kind} attested by {statement.signer.source}"
        if recompute and statement.kind == TRAINING:
            success_text += f" ({'inputs' if base and data else 'its record'} compared, training not repeated)"
        elif recompute and statement.kind != TESTS:  # what was measured once is not computed again
            success_text += " (computed again)"
    attested = (
        {"attestations": [signing_options.attestation_document(statement) for statement in result.attestations]}
        if attestations
        else {}
    )
    return view.show(settings, source, result.findings, success_text=success_text, extra=attested)

"""`adapterhub withdraw`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from adapterhub.cli import catalogs, output, signing_options
from adapterhub.cli.completions import complete_ref
from adapterhub.cli.options import Settings, command, dry_run_option
from adapterhub.cli.remote_choice import place_words, remote_option
from adapterhub_converters.errors import UsageError

if TYPE_CHECKING:
    from adapterhub.ref import Ref
    from adapterhub.registry.releases.release_moves import Withdrawal
    from adapterhub.remotes.catalog import Catalog


@command(
    "withdraw",
    example="""
    adapterhub withdraw team/sql:v4 -m "a customer's address in the weights"
    adapterhub withdraw team/sql:v4 -m "leaked key" --everywhere --remote
    adapterhub withdraw team/sql:v4 --undo""",
)
@click.argument("ref", shell_complete=complete_ref)
@click.option("-m", "--message", metavar="TEXT", help="Record a reason, which everybody who asks for the version is told.")
@click.option("--everywhere", is_flag=True, help="Withdraw these bytes under every name that has them.")
@click.option("--undo", is_flag=True, help="Undo it: let the version be used again.")
@signing_options.optional_signer
@dry_run_option
@remote_option
@click.pass_obj
def withdraw(
    settings: Settings,
    *,
    ref: str,
    message: str | None,
    everywhere: bool,
    undo: bool,
    signer: signing_options.SignerOption | None,
    dry_run: bool,
    remote: str | None,
) -> None:
    """Withdraw one version: it is served, pulled, resolved and promoted no more, by any name of it.

    Its bytes stay for the audit until `adapterhub gc --withdrawn`. `latest` moves to the newest other version; other tags that
    meant it stay, and cannot be used until they move: `adapterhub rollback NAME:TAG`. The same bytes cannot be pushed to the
    name again. A signed version is withdrawn by its signer (--key), by the owner of the registry, or by an admin of the hub.
    """
    from adapterhub.remotes.release_documents import withdrawal_document
    from adapterhub.remotes.version_documents import version_document

    if undo:
        if message or everywhere or signer:
            raise UsageError("--undo", "takes REF alone", "Leave the other options out", code="conflicting-options")
        with catalogs.catalog_of(settings, ref, remote, "withdrawal of versions", dry_run=dry_run) as (catalog, target):
            version = catalog.undo_withdrawal(target)
        undone = version_document(version)
        del undone["new"], undone["skipped"]
        text = f"{version.ref} can be used again"
        output.emit_change(undone, as_json=settings.as_json, text=lambda: output.write(text), dry_run=dry_run)
        return
    if not (message or "").strip():
        raise UsageError(
            "--message", "is required: everybody who asks for the version is told", "Say why", code="reason-required"
        )
    with catalogs.catalog_of(settings, ref, remote, "withdrawal of versions", dry_run=dry_run) as (catalog, target):
        withdrawals = _withdraw(catalog, target, str(message), signer, everywhere=everywhere)
    document = {"withdrawn": [withdrawal_document(withdrawal) for withdrawal in withdrawals]}
    output.emit_change(document, as_json=settings.as_json, text=lambda: _write(withdrawals, remote), dry_run=dry_run)


def _withdraw(
    catalog: Catalog, ref: Ref, reason: str, signer: signing_options.SignerOption | None, *, everywhere: bool
) -> Sequence[Withdrawal]:
    if signer is None:
        return catalog.withdraw(ref, reason, everywhere=everywhere)
    from adapterhub.registry.releases.withdrawal_rights import WithdrawalClaim
    from adapterhub.trust import release_claims

    key, digest = signer.read(), catalog.show(ref)["digest"]
    bundle = release_claims.sign(release_claims.WITHDRAWAL, ref.name, digest, key, text=reason)
    return catalog.withdraw(ref, reason, WithdrawalClaim(bundle, key.public), everywhere=everywhere)


def _write(withdrawals: Sequence[Withdrawal], remote: str | None) -> None:
    for withdrawal in withdrawals:
        output.write(output.one_line(f"{withdrawal.ref} is withdrawn: {withdrawal.reason}"))
        if withdrawal.moved_latest:
            output.write(f"{withdrawal.name} is v{withdrawal.latest}, the newest version that is left")
        elif not withdrawal.latest:
            output.write(f"{withdrawal.name} has no version that is left: it cannot be used until the next push")
        for tag in withdrawal.tags:
            moves = f"`adapterhub rollback {withdrawal.name}:{tag}{place_words(remote)}`"
            if withdrawal.latest:
                promotion = f"`adapterhub promote {withdrawal.name}:v{withdrawal.latest} {tag}{place_words(remote)}`"
                moves += f", or {promotion} if it meant no other version before"
            output.write(f"{withdrawal.name}:{tag} cannot be used until it moves: {moves}")

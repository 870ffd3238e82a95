"""`adapterhub hub log`, `backup`, `load-backup` and `doctor`: for the operator of a hub."""

from __future__ import annotations

import datetime
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterhub.cli import output, progress, registry_choice
from adapterhub.cli.options import Command, Settings
from adapterhub.cli.output import Column
from adapterhub_converters.errors import IntegrityError

from .tables import hub_database

if TYPE_CHECKING:
    from adapterhub.hub.accounts.audit_log import Event
    from adapterhub.hub.operations.health import Check
    from adapterhub.hub.settings import HubSettings


@click.command(
    "log",
    cls=Command,
    short_help="Show who changed what.",
    example="""
    adapterhub hub log
    adapterhub hub log team/sql --verify""",
)
@click.argument("name", required=False, default="")
@click.option("--account", metavar="NAME", default="", help="Only what this account did.")
@click.option("--limit", metavar="N", type=click.IntRange(0), default=50, show_default=True, help="Show at most N.")
@click.option("--verify", is_flag=True, help="Check first that no row was changed, removed or inserted.")
@click.pass_obj
def log(settings: Settings, *, name: str, account: str, limit: int, verify: bool) -> None:
    """Show who changed what at the hub and who was refused, of NAME or of a namespace only if it is given.

    Each row has a hash over itself and the one before it. Rows that were cut off at the end leave no trace in the chain: sign
    checkpoints with `adapterhub audit`. Exits 4 when --verify finds a row that does not fit.
    """
    from adapterhub.hub.accounts import audit_log

    with closing(hub_database(settings)) as database:
        if verify:
            newest, broken = audit_log.verify_chain(database)
            if broken is not None:
                raise IntegrityError(database.location, f"{broken.where} {broken.what}", "Compare it with a backup")
            output.say(f"verified: each row up to {newest[0]} follows from the one before" if newest else "verified: no rows")
        events = audit_log.events(database, name=name, account=account, limit=limit)
    document = {"verified": verify, "events": [asdict(event) for event in events]}
    output.emit(document, as_json=settings.as_json, text=lambda: _log_text(events))


_EVENTS = (
    Column("TIME"),
    Column("ACCOUNT"),
    Column("ACTION"),
    Column("NAME"),
    Column("DETAIL", drop=2),
    Column("FROM", drop=1),
)


def _log_text(events: list[Event]) -> None:
    if not events:
        output.say("nothing was recorded")
        return
    output.write_table(
        _EVENTS,
        [[_moment(event.time), event.account, event.action, event.name, event.detail, event.address] for event in events],
    )


def _moment(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%SZ")


# ---- backups


@click.command(
    "backup",
    cls=Command,
    short_help="Write the whole hub to one file.",
    example="""
    adapterhub hub backup hub-2026-11-26.tar""",
)
@click.argument("file", type=click.Path(path_type=Path))
@click.pass_obj
def backup(settings: Settings, *, file: Path) -> None:
    """Write the registry and hub.db, with accounts, tokens' hashes, quotas and the audit log, to a new FILE; the hub may run.

    A hub in $ADAPTERHUB_DATABASE and $ADAPTERHUB_BLOBS is written in the same form, which a folder can be restored from too.

    FILE is an image layout in a tar, and every blob in it was compared with its digest. Keep it as you keep the hub itself:
    whoever has it has all adapters, and the secret that signs uploads.
    """
    from adapterhub.hub.operations import backup as backups
    from adapterhub.hub.storage.from_settings import open_storage

    hub_settings = _existing_hub(settings)
    with progress.bytes_bar("backing up") as bar, closing(open_storage(hub_settings)) as storage:
        size = backups.write(storage, file, bar)
    document = {"file": str(file), "bytes": size, "registry": hub_settings.location}
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(f"{file}  {output.size(size)}"))


@click.command(
    "load-backup",
    cls=Command,
    short_help="Restore a hub from a backup.",
    example="""
    adapterhub hub load-backup hub-2026-11-26.tar --registry /srv/hub""",
)
@click.argument("file", type=click.Path(path_type=Path))
@click.pass_obj
def load_backup(settings: Settings, *, file: Path) -> None:
    """Restore the registry that --registry names, and its hub.db, from a backup. The folder must be new or empty.

    With $ADAPTERHUB_DATABASE and $ADAPTERHUB_BLOBS it is restored there; the database must be empty.

    Every blob is compared with its digest, and registry.db is rebuilt. Tokens are as they were when the backup was made: one
    that was revoked since is in force again.
    """
    from adapterhub.hub.operations import backup as backups

    hub_settings = registry_choice.shared_hub(settings) or registry_choice.hub_settings(settings)
    with progress.bytes_bar("restoring") as bar:
        if hub_settings.database:
            backups.restore_shared(file, hub_settings, bar)
        else:
            backups.restore(file, hub_settings.registry, bar)
    document = {"registry": hub_settings.location, "file": str(file)}
    text = f"{hub_settings.location}  restored from {file}"
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(text))


def _existing_hub(settings: Settings) -> HubSettings:
    """Return the settings of the hub that is meant; NotFoundError if its folder has no registry."""
    if shared := registry_choice.shared_hub(settings):
        return shared
    registry_choice.open_registry(settings).close()
    return registry_choice.hub_settings(settings)


# ---- health


@click.command(
    "doctor",
    cls=Command,
    short_help="Check what a hub depends on.",
    example="""
    adapterhub hub doctor
    adapterhub hub doctor --certificate hub.pem""",
)
@click.option("--certificate", metavar="PEM", type=click.Path(path_type=Path), help="Certificate, to serve HTTPS.")
@click.pass_obj
def doctor(settings: Settings, *, certificate: Path | None) -> int:
    """Check what a hub needs: its database and store, free space, permissions, the clock, tokens, the audit log, a certificate.

    The hub may run meanwhile. Exits 1 when something is wrong; warnings do not count.
    """
    from adapterhub.hub.operations import health

    hub_settings = _existing_hub(settings)
    checks = health.diagnosis(hub_settings, certificate)
    document = {"registry": hub_settings.location, "checks": [asdict(check) for check in checks]}
    output.emit(document, as_json=settings.as_json, text=lambda: _doctor_text(checks))
    return int(any(check.state == health.ERROR for check in checks))


_CHECKS = (Column("CHECK"), Column("STATE"), Column("WHAT"))


def _doctor_text(checks: list[Check]) -> None:
    output.write_table(_CHECKS, [[check.name, check.state, check.what] for check in checks])

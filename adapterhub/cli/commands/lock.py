"""`adapterhub lock`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import environment, locks, output, remote_choice
from adapterhub.cli.options import Settings, command
from adapterhub.cli.output import Column
from adapterhub.cli.registry_choice import workspace
from adapterhub.operations import lock as lock_operation
from adapterhub_converters.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from adapterhub.project.lockfile import Lock, LockedAdapter


@command(
    "lock",
    example="""
    adapterhub lock team/sql:prod --remote
    adapterhub pull --locked
    adapterhub lock --check
    adapterhub lock --update team/sql""",
)
@click.argument("refs", metavar="[REF…]", nargs=-1)
@remote_choice.remote_option
@click.option("--check", is_flag=True, help="Report tags that have moved since (exit 1).")
@click.option("--update", is_flag=True, help="Lock again the names in REF…, or all.")
@click.pass_obj
def lock(settings: Settings, *, refs: tuple[str, ...], remote: str | None, check: bool, update: bool) -> int:
    """Record in adapters.lock the version that each REF points to now: digest, base, size and source.

    `pull --locked` then writes exactly these, byte for byte, wherever the tags point by then. The file is next to the project's
    adapterhub.toml, else in this folder; without REF it is shown. REF may be an address, or a ref on a remote.
    """
    if check and update:
        raise UsageError("--check", "cannot be combined with --update", "Leave one out", code="conflicting-options")
    if (check or update) and remote is not None:
        raise UsageError("--remote", "is recorded in the lock file", "Leave it out", code="conflicting-options")
    if check:
        return _check(settings, refs)
    if update:
        _update(settings, refs)
    elif refs:
        entries = [_resolve(settings, ref, remote) for ref in refs]
        _record(settings, {entry.name: entry for entry in entries})
    else:
        _show(settings)
    return 0


def _resolve(settings: Settings, ref: str, remote: str | None) -> LockedAdapter:
    """Return the entry of the version that a ref points to now."""
    from adapterhub.remotes.address_schemes import is_address

    address = remote_choice.ref_at_remote(ref, remote)
    if is_address(address):
        environment.remember_host(address)
        return lock_operation.entry_of_ref(ref, address, workspace(settings))
    with remote_choice.hint_default_remote(ref):
        return lock_operation.entry_of_ref(ref, None, workspace(settings))


def _record(settings: Settings, entries: Lock) -> None:
    from adapterhub.project import lockfile

    path = environment.lock_file()
    is_new = lockfile.record(path, entries)
    document = {
        "file": str(path),
        "new": is_new,
        "adapters": [{"name": name, **entry.document()} for name, entry in entries.items()],
    }

    def text() -> None:
        for name, entry in entries.items():
            output.write(f"{name}  {output.size(entry.size)}  {output.digest(entry.digest)}  {entry.source}")
        output.say(f"{'locked in' if is_new else 'already locked in'} {locks.display_path(path)}")

    output.emit(document, as_json=settings.as_json, text=text)


def _update(settings: Settings, names: tuple[str, ...]) -> None:
    from adapterhub.project import lockfile

    path = environment.lock_file()
    entries = lockfile.select(lockfile.read(path), names, path)
    _record(
        settings,
        {
            name: lock_operation.resolve_again(locked, workspace(settings), environment.lock_file())
            for name, locked in entries.items()
        },
    )


def _check(settings: Settings, names: tuple[str, ...]) -> int:
    from adapterhub.project import lockfile

    path = environment.lock_file()
    entries = lockfile.select(lockfile.read(path), names, path)
    rows = []
    for name, locked in sorted(entries.items()):
        try:
            current_digest = lock_operation.resolve_again(locked, workspace(settings), path).digest
        except NotFoundError:
            current_digest = None
        rows.append(
            {
                "name": name,
                "ref": locked.ref,
                "locked": locked.digest,
                "now": current_digest,
                "moved": current_digest != locked.digest,
            }
        )
    moved = [row for row in rows if row["moved"]]
    document = {"file": str(path), "ok": not moved, "adapters": rows}
    output.emit(document, as_json=settings.as_json, text=lambda: _check_text(rows, len(moved)))
    return 1 if moved else 0


def _check_text(rows: list[dict[str, Any]], moved: int) -> None:
    for row in rows:
        if row["moved"]:
            change = f"is now {output.digest(row['now'])}" if row["now"] else "no longer exists"
            output.write(output.one_line(f"{row['name']}: {row['ref']} {change}, locked: {output.digest(row['locked'])}"))
    count = output.plural(len(rows), "adapter")
    output.write(
        f"{moved} of {count} moved; run `adapterhub lock --update` to lock them again" if moved else f"ok: {count}, none moved"
    )


_LIST = (
    Column("NAME"),
    Column("REF", drop=3),
    Column("SIZE", right=True, drop=4),
    Column("DIGEST"),
    Column("BASE", drop=2),
    Column("SOURCE", drop=5),
)


def _show(settings: Settings) -> None:
    from adapterhub.project import lockfile

    path = environment.lock_file()
    entries = sorted(lockfile.read(path).values(), key=lambda entry: entry.name)
    document = {"file": str(path), "adapters": [{"name": entry.name, **entry.document()} for entry in entries]}
    cells = [
        [entry.name, entry.ref, output.size(entry.size), output.digest(entry.digest), _base(entry), entry.source]
        for entry in entries
    ]
    output.emit(document, as_json=settings.as_json, text=lambda: output.write_table(_LIST, cells))


def _base(locked: LockedAdapter) -> str:
    return locked.base.get("repo", "").rpartition("/")[2] or output.digest(locked.base.get("fingerprint", "-"))
